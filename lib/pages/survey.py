"""Survey: lengths, norms and a sample of a run's vectors, read once and in bounded memory.

Memory holds the lengths and the norm of every record, and the vectors of an even sample.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.arrow import numbers
from lib.embeddings.reading import RunEmbeddings, values
from lib.errors import IdentityRefusedError
from schema.parquet import VectorColumn

__all__ = ["SAMPLE_RECORDS", "Extreme", "Survey", "survey"]

# As many points as a drawing can show and a browser draws without delay.
SAMPLE_RECORDS = 2000
_EXTREMES = 3


@dataclass(frozen=True, order=True)
class Extreme:
    """A record whose vector has one of the smallest or largest norms."""

    norm: float
    record: int
    id: str


@dataclass(frozen=True)
class Survey:
    """The findings, in FASTA order.

    column: the surveyed vectors, mean_L or bos_L; None if the run kept neither: then norms,
        smallest, largest and sample_vectors are empty.
    lengths, embedded: (N,) residues in the FASTA, residues embedded.
    norms: (N,) Euclidean norms of the vectors.
    smallest, largest: the records with the extreme norms, the most extreme first.
    sample: (n,) places of the sampled records in FASTA order, evenly spaced.
    sample_ids, sample_vectors: (n,) and (n, hidden_dim).
    repeated_ids: the number of records with the id of an earlier record.
    """

    column: str | None
    lengths: npt.NDArray[np.int32]
    embedded: npt.NDArray[np.int32]
    norms: npt.NDArray[np.float64]
    smallest: list[Extreme]
    largest: list[Extreme]
    sample: npt.NDArray[np.int64]
    sample_ids: list[str]
    sample_vectors: npt.NDArray[np.float32]
    repeated_ids: int


def survey(run: RunEmbeddings) -> Survey:
    """Read a run once: the vectors of its last layer, `mean` if it kept them, else `bos`.

    Raises IdentityRefusedError for a vector with non-finite values, which the ledger never writes.
    """
    kind = next((one for one in ("mean", "bos") if one in run.facts["include"]), None)
    column = None if kind is None else run.column(kind)
    total, width = len(run), 0 if column is None else run.hidden_dim
    step = max(1, -(-total // SAMPLE_RECORDS))
    sample = np.arange(0, total, step)
    sample_ids = [""] * len(sample)
    sample_vectors = np.zeros((len(sample), width), np.float32)
    lengths, embedded = np.zeros(total, np.int32), np.zeros(total, np.int32)
    names = np.zeros(total, np.uint64)
    norms = np.zeros(total if column else 0)
    smallest: list[Extreme] = []
    largest: list[Extreme] = []
    wanted = ["id", "length", "embedded_length"] + ([str(column)] if column else [])
    for positions, table in run.stored(*wanted):
        ids = table.column("id").to_pylist()
        names[positions] = [_short_digest(one) for one in ids]
        lengths[positions] = numbers(table.column("length"))
        embedded[positions] = numbers(table.column("embedded_length"))
        sampled = np.flatnonzero(positions % step == 0)
        for row in sampled.tolist():
            sample_ids[positions[row] // step] = ids[row]
        if column is not None:
            vectors = values(table.column(str(column))).reshape(-1, width)
            sample_vectors[positions[sampled] // step] = vectors[sampled]
            here = norms[positions] = _norms(vectors, run, positions, column)
            records = run.records[positions].tolist()
            order = np.argsort(here, kind="stable").tolist()
            ends = [Extreme(float(here[i]), records[i], ids[i]) for i in _ends(order)]
            smallest = sorted({*smallest, *ends})[:_EXTREMES]
            largest = sorted({*largest, *ends}, reverse=True)[:_EXTREMES]
    return Survey(
        column=None if column is None else str(column),
        lengths=lengths,
        embedded=embedded,
        norms=norms,
        smallest=smallest,
        largest=largest,
        sample=sample,
        sample_ids=sample_ids,
        sample_vectors=sample_vectors,
        repeated_ids=total - len(np.unique(names)),
    )


def _norms(
    vectors: npt.NDArray[np.float32],
    run: RunEmbeddings,
    positions: npt.NDArray[np.int64],
    column: VectorColumn,
) -> npt.NDArray[np.float64]:
    # In float64, because a sum of squares in float32 could overflow.
    norms: npt.NDArray[np.float64] = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
    broken = positions[~np.isfinite(norms)]
    if len(broken):
        record = run.records[broken[0]]
        raise IdentityRefusedError(
            f"run {run.facts['id']}: record {record}: {column} is not finite"
        )
    return norms


def _ends(order: list[int]) -> set[int]:
    return {*order[:_EXTREMES], *order[-_EXTREMES:]}


def _short_digest(name: str) -> int:
    """Return 64 bits: among a hundred million ids, two share one in 1 of 3,700 runs."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
