"""Neighbours: for each record of one run the nearest records of another, by cosine, exactly.

Every query is compared with every target by plain matrix products: BLAS does all of the work, as it
would in the exact index of FAISS. Queries and targets go through in blocks, so memory does not
grow with either run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from lib.arrow import arrow_array
from lib.embeddings.provenance import described_path, facts_of, facts_path, facts_text
from lib.embeddings.reading import RunEmbeddings, values
from lib.embeddings.selection import ordered_vectors
from lib.errors import IdentityRefusedError, LedgerError, SettingsError
from lib.files import new_path, refuse_existing
from schema.parquet import EXPORT_KEY, VectorColumn

__all__ = ["Neighbours", "nearest", "refuse_incomparable", "refuse_target", "write_nearest"]

Vectors = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

_QUERY_BYTES = 64 << 20  # of vectors, for each pass over the targets
_COSINES = 1 << 23  # at once
_KEPT = 1 << 22  # neighbours of the queries of a pass
_ROWS_AT_ONCE = 1 << 20  # whose names have less than 2 GB
# What a cosine of float32 vectors is good for. Closer ones count as equal.
_DECIMALS = 6
# What two runs must agree on for their vectors to be points of one space.
_IDENTITY = ("precision", "compile", "max_residues", "long_sequences")
# Keys of the model's snapshot that two runs of the same weights may differ in.
_FREE = {"name", "repr_layers", "contact_regression_sha256", "released", "base_name"}
_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of some consecutive queries, the nearest first.

    first: the place of the first query in its run. places: (queries, count) places of the
    neighbours in theirs, in FASTA order. cosines: (queries, count), to six decimals.
    """

    first: int
    places: Places
    cosines: Vectors


def refuse_incomparable(targets: RunEmbeddings, queries: RunEmbeddings) -> None:
    """Raise IdentityRefusedError at the first difference by which vectors are not comparable."""
    of = f"run {queries.facts['id']}"
    one, other = targets.model, queries.model
    for key in sorted({*one, *other} - _FREE):
        _refuse_difference(targets, of, key, one.get(key), other.get(key))
    for key in _IDENTITY:
        _refuse_difference(targets, of, key, targets.facts[key], queries.facts[key])


def refuse_target(to: Path, count: int) -> None:
    """Raise SettingsError for a count below 1, and for a path that `write_nearest` cannot write."""
    if count < 1:
        raise SettingsError(f"neighbours {count}: not 1 or more")
    refuse_existing(to)
    if to.suffix not in _SUFFIXES:
        raise SettingsError(f"{to}: neither {' nor '.join(_SUFFIXES)}")
    if to.suffix == ".csv":
        refuse_existing(facts_path(to))


def nearest(
    targets: RunEmbeddings,
    queries: RunEmbeddings,
    column: VectorColumn,
    vectors: Vectors,
    count: int,
) -> Iterator[Neighbours]:
    """Yield the `count` nearest targets of every query, a block of queries at a time.

    vectors: (len(queries), hidden_dim), those of the queries at `column`, in FASTA order. A query
    is not its own neighbour if both runs are the same. Equal cosines are in FASTA order. Raises
    LedgerError for a vector that is zero and so has no direction.
    """
    own = targets.facts["uuid"] == queries.facts["uuid"]
    count = min(count, len(targets) - own)
    rows = max(1, min(_QUERY_BYTES // (4 * targets.hidden_dim), _KEPT // max(1, count)))
    for first in range(0, len(queries), rows):
        part = _directions(vectors[first : first + rows], queries, first + np.arange(rows), column)
        best = _Best(len(part), count)
        for positions, block in _blocks(targets, column, len(part)):
            cosines = part @ block.T
            if own:
                inside = (positions >= first) & (positions < first + len(part))
                cosines[positions[inside] - first, np.flatnonzero(inside)] = -np.inf
            best.add(positions, cosines)
        yield Neighbours(first, best.places, best.cosines)


def write_nearest(
    targets: RunEmbeddings, queries: RunEmbeddings, to: Path, column: VectorColumn, count: int
) -> None:
    """Write a row per query and neighbour, as .csv or .parquet.

    Columns: query_record, query, rank (from 1), target_record, target, cosine. The facts of both
    runs stand in the Parquet footer, or in `to`.json beside a CSV. Raises what `nearest` and
    `refuse_target` raise, and IdentityRefusedError for runs that are not comparable or a column
    that the queries lack.
    """
    refuse_target(to, count)
    refuse_incomparable(targets, queries)
    if column.layer not in queries.layers or column.kind not in queries.facts["include"]:
        raise IdentityRefusedError(f"run {queries.facts['id']}: {column} is not kept")
    facts = {
        "neighbours": count,
        "measure": "cosine",
        "targets": facts_of(targets, [column]),
        "queries": facts_of(queries, [column]),
    }
    with ordered_vectors(queries, column, to) as vectors, _new_table(to, facts) as file:
        for found in nearest(targets, queries, column, np.asarray(vectors), count):
            file.write_table(_rows(targets, queries, found))


_SCHEMA = pa.schema(
    [
        pa.field("query_record", pa.int64()),
        pa.field("query", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("target_record", pa.int64()),
        pa.field("target", pa.string()),
        pa.field("cosine", pa.float32()),
    ]
)


class _Best:
    """The nearest of all targets so far, for each query of a block."""

    def __init__(self, queries: int, count: int) -> None:
        self.places = np.zeros((queries, count), np.int64)
        self.cosines = np.full((queries, count), -np.inf, np.float32)

    def add(self, positions: Places, cosines: Vectors) -> None:
        """Compare with further targets; cosines: (queries, len(positions))."""
        queries, count = self.places.shape
        if count == 0:
            return
        least = self.cosines[:, -1]
        if least[0] < -1 and len(positions) > count:
            least = np.partition(cosines, -count, axis=1)[:, -count]
        # What rounding makes equal to the least is a candidate, too.
        row, number = np.nonzero(cosines >= (least - 10.0**-_DECIMALS)[:, None])
        found = np.round(cosines[row, number], _DECIMALS)
        row = np.concatenate([np.repeat(np.arange(queries), count), row])
        found = np.concatenate([self.cosines.reshape(-1), found])
        place = np.concatenate([self.places.reshape(-1), positions[number]])
        order = np.lexsort((place, -found, row))
        starts = np.searchsorted(row[order], np.arange(queries))
        kept = order[starts[:, None] + np.arange(count)]
        self.cosines, self.places = found[kept], place[kept]


def _refuse_difference(
    targets: RunEmbeddings, queries: str, key: str, was: object, now: object
) -> None:
    if was != now:
        raise IdentityRefusedError(f"{queries}: {key} is {now}, {was} in run {targets.facts['id']}")


def _blocks(
    targets: RunEmbeddings, column: VectorColumn, queries: int
) -> Iterator[tuple[Places, Vectors]]:
    """Yield the places and directions of all targets, as many at once as cosines are allowed."""
    step = max(1, _COSINES // queries)
    for positions, table in targets.stored(column):
        rows = values(table.column(str(column))).reshape(-1, targets.hidden_dim)
        for first in range(0, len(rows), step):
            here = positions[first : first + step]
            yield here, _directions(rows[first : first + step], targets, here, column)


def _directions(
    rows: Vectors, run: RunEmbeddings, positions: Places, column: VectorColumn
) -> Vectors:
    """Return rows of length 1; raises LedgerError for one that is zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    zero = np.flatnonzero(norms[:, 0] == 0)
    if len(zero):
        record = run.records[positions[zero[0]]]
        raise LedgerError(
            f"run {run.facts['id']}: record {record}: {column} is zero and has no cosine"
        )
    directions: Vectors = rows / norms
    return directions


@contextmanager
def _new_table(to: Path, facts: Mapping[str, Any]) -> Iterator[csv.CSVWriter | pq.ParquetWriter]:
    """Yield a writer of rows of _SCHEMA; the file appears at `to` at the end of the block."""
    if to.suffix == ".csv":
        with described_path(to, facts) as path, csv.CSVWriter(path, _SCHEMA) as file:
            yield file
    else:
        schema = _SCHEMA.with_metadata({EXPORT_KEY: facts_text(facts)})
        with (
            new_path(to, folder=False) as path,
            pq.ParquetWriter(path, schema, compression="zstd") as file,
        ):
            yield file


def _rows(targets: RunEmbeddings, queries: RunEmbeddings, found: Neighbours) -> pa.Table:
    size, count = found.places.shape
    query = np.repeat(np.arange(found.first, found.first + size), count)
    target = found.places.reshape(-1)
    content: dict[str, Any] = {
        "query_record": queries.records[query],
        "query": [queries.ids[place] for place in query.tolist()],
        "rank": np.tile(np.arange(1, count + 1), size),
        "target_record": targets.records[target],
        "target": [targets.ids[place] for place in target.tolist()],
        "cosine": found.cosines.reshape(-1),
    }
    # In pieces, since names of over 2 GB fit in no array.
    pieces = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, len(query), _ROWS_AT_ONCE)]
    columns = [
        pa.chunked_array(
            [arrow_array(content[field.name][piece], field.type) for piece in pieces], field.type
        )
        for field in _SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)
