"""Verification: a sample of a run, computed again by another library and compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib.embeddings.reading import open_run
from lib.errors import MachineError, SettingsError
from lib.jobs.admission import admit
from lib.jobs.fair_esm import Answer, needed_bytes
from lib.jobs.references import ChosenReference, choose_reference
from lib.jobs.sample import Sample, SampledRecord, draw_sample
from lib.ledger.database import open_for_reading
from lib.ledger.runs import load_run
from lib.models.detection import Detection
from lib.network.device import use_threads
from lib.network.memory import available_bytes, ran_out
from lib.sequences.windows import read_windows
from lib.settings import Overrides
from lib.units import size
from schema.parquet import VectorColumn, vector_columns
from schema.tables import Run

__all__ = ["COLUMNS", "Agreement", "Verification", "verify_run"]

# The design's bounds by precision: relative L2 error per residue, and cosine of pooled vectors.
# Contacts are probabilities: the same bound holds for their absolute error.
_ERROR_BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
_COSINE_BOUND = 0.9999
# What writing per_tok as float16 adds: half a unit in the last place, 2 ** -11.
_FLOAT16_ROUNDING = 5e-4

COLUMNS = (
    "column", "compared", "worst error", "median error", "at most", "worst cosine",
    "median cosine", "at least", "verdict", "worst record",
)  # fmt: skip

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Agreement:
    """How near a column of a run is to the reference.

    `compared` counts vectors, or contacts; errors are relative L2 errors of vectors or absolute
    errors of contacts; cosines are None for contacts, their bound where only errors are bounded.
    """

    column: str
    compared: int
    worst_error: float
    median_error: float
    error_bound: float
    worst_cosine: float | None
    median_cosine: float | None
    cosine_bound: float | None
    worst_record: int
    worst_id: str

    @property
    def good(self) -> bool:
        """Whether nothing is outside the bounds; what is not finite is."""
        near = self.worst_error <= self.error_bound
        if self.cosine_bound is None or self.worst_cosine is None:
            return near
        return near and self.worst_cosine >= self.cosine_bound

    def cells(self) -> tuple[object, ...]:
        """Return the cells of a table with COLUMNS."""
        return (
            self.column,
            self.compared,
            f"{self.worst_error:.1e}",
            f"{self.median_error:.1e}",
            f"{self.error_bound:.1e}",
            None if self.worst_cosine is None else f"{self.worst_cosine:.7f}",
            None if self.median_cosine is None else f"{self.median_cosine:.7f}",
            self.cosine_bound,
            "good" if self.good else "OUTSIDE",
            f"{self.worst_record} ({self.worst_id})",
        )


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    reference: the library that computed, and its version. records: positions in the FASTA of what
    was computed again; `left_out` tells of records that were drawn but do not fit into memory.
    """

    run: Run
    seed: int
    reference: ChosenReference
    sample: Sample
    records: list[int]
    left_out: list[str]
    agreements: list[Agreement]

    @property
    def good(self) -> bool:
        """Whether every column is within its bounds."""
        return all(one.good for one in self.agreements)

    def describe(self) -> str:
        """Return the verdict in one line."""
        untrained = " (untrained weights)" if (self.run.esm2_config or {}).get("untrained") else ""
        outside = ", ".join(one.column for one in self.agreements if not one.good)
        verdict = f"{outside} outside the bounds" if outside else "within the bounds"
        return (
            f"run {self.run.id}: {verdict} of {self.run.precision}; {len(self.records)} of "
            f"{self.run.records_total} records computed again by {self.reference.describe()} in "
            f"float32 (seed {self.seed}){untrained}"
        )

    def json(self) -> dict[str, Any]:
        """Return the verification for programs; None in the place of NaN and infinity."""
        return {
            "run": self.run.id,
            "good": self.good,
            "precision": self.run.precision,
            "untrained": bool((self.run.esm2_config or {}).get("untrained")),
            "seed": self.seed,
            "reference": self.reference.libraries,
            "own_reader": self.reference.own_reader,
            "records": self.records,
            "drawn": self.sample.drawn,
            "always": self.sample.always,
            "left_out": self.left_out,
            "columns": [
                {key: _finite(value) for key, value in vars(one).items()} | {"good": one.good}
                for one in self.agreements
            ],
        }


@dataclass(frozen=True)
class _Compared:
    """Errors and cosines of one column of one record; cosines: empty for contacts."""

    record: int
    id: str
    errors: Array
    cosines: Array


def verify_run(
    url: str,
    run_id: int,
    overrides: Overrides,
    sample: int,
    seed: int,
    say: Callable[[str], None],
    output: Path | None = None,
) -> Verification:
    """Compute `sample` records of a run, drawn by `seed`, again and compare every column of them.

    Beside them always go the longest, the shortest, a truncated record, two that share their
    sequence, and of a run that copied some from earlier runs a copied and a computed one.
    overrides: "section.option" to text, for what lies elsewhere now; output: where the run's folder
    does. All that resuming the run would check is checked first: rows, files, weights and input by
    digest. `say` is told what is about to be computed by what, and what is left out. Raises
    IdentityRefusedError at the first difference, SettingsError if there is nothing to compare,
    MachineError for memory.
    """
    if sample < 1:
        raise SettingsError(f"sample {sample}: less than one record")
    engine = open_for_reading(url)
    try:
        run = load_run(engine, run_id, output)
    finally:
        engine.dispose()
    admission = admit(run, overrides, recompute_damaged=False)
    kept = open_run(url, run_id, partial=True, verify=True, output=output)
    if not len(kept):
        raise SettingsError(f"run {run_id}: no record is done")
    use_threads(admission.settings.compute)
    windows = read_windows(admission.settings.input, admission.inventory)
    drawn = draw_sample(windows, kept.records, kept.copied, sample, seed)
    reference = choose_reference(admission.detection)
    records = dict(drawn.records)
    left_out = [*_too_large(records, admission.detection, reference.libraries)]
    for line in left_out:
        say(f"left out: {line}")
    if not records:
        raise MachineError(f"run {run_id}: no drawn record fits into memory: {left_out[0]}")
    say(f"run {run_id}: {len(records)} records go through {reference.describe()} (seed {seed})")
    columns = vector_columns(run.include, run.repr_layers)
    found: dict[VectorColumn, list[_Compared]] = {column: [] for column in columns}
    for number, record in records.items():
        truth = _answer(reference, record, run)
        for column, vectors in kept.row(number, *columns).items():
            errors, cosines = _compare(column, vectors, truth)
            found[column].append(_Compared(number, record.id, errors, cosines))
    agreements = [_agreement(run, column, compared) for column, compared in found.items()]
    return Verification(run, seed, reference, drawn, [*records], left_out, agreements)


def _too_large(
    records: dict[int, SampledRecord], detection: Detection, libraries: str
) -> Iterator[str]:
    """Take out what does not fit into memory; yield a line on each."""
    contacts = detection.regression is not None
    all_needed = {
        number: needed_bytes(detection.shape, len(record.residues), contacts=contacts)
        for number, record in records.items()
    }
    available = available_bytes(torch.device("cpu"), max(all_needed.values(), default=0))
    for number, needed in all_needed.items():
        if available is not None and needed > available:
            record = records.pop(number)
            residues = len(record.residues)
            yield (
                f"record {record.number} ({record.id}): {residues} residues need "
                f"{size(needed)} of memory in {libraries}, {size(available)} are available"
            )


def _answer(reference: ChosenReference, record: SampledRecord, run: Run) -> Answer:
    contacts = "contacts" in run.include
    try:
        return reference.model.compute(record.residues, run.repr_layers, contacts=contacts)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise MachineError(
            f"record {record.number} ({record.id}): out of memory in {reference.libraries} for "
            f"{len(record.residues)} residues"
        ) from None


def _compare(column: VectorColumn, kept: Array, truth: Answer) -> tuple[Array, Array]:
    """Return errors and cosines of a column of one record; kept: flat, as it was written."""
    if column.layer is None:
        assert truth.contacts is not None
        return np.abs(kept - truth.contacts.ravel()), np.empty(0)
    tokens = truth.tokens[column.layer].astype(np.float64)
    residues = tokens[1:-1]
    whole = {"mean": residues.mean(0, keepdims=True), "bos": tokens[:1], "per_tok": residues}
    expected = whole[column.kind]
    found = kept.astype(np.float64).reshape(expected.shape)
    norms = np.linalg.norm(expected, axis=1)
    errors = np.linalg.norm(found - expected, axis=1) / norms
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / norms
    return errors, cosines


def _agreement(run: Run, column: VectorColumn, compared: Sequence[_Compared]) -> Agreement:
    worst = max(compared, key=lambda one: _largest(one.errors))
    errors = np.concatenate([one.errors for one in compared])
    cosines = np.concatenate([one.cosines for one in compared])
    bound = _ERROR_BOUNDS[run.precision]
    if column.kind == "per_tok" and run.per_tok_dtype == "float16":
        bound += _FLOAT16_ROUNDING
    return Agreement(
        column=str(column),
        compared=len(errors),
        worst_error=float(errors.max()),
        median_error=float(np.median(errors)),
        error_bound=bound,
        worst_cosine=float(cosines.min()) if len(cosines) else None,
        median_cosine=float(np.median(cosines)) if len(cosines) else None,
        cosine_bound=_COSINE_BOUND if column.is_pooled and run.precision != "float32" else None,
        worst_record=worst.record,
        worst_id=worst.id,
    )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _largest(errors: Array) -> float:
    largest = float(errors.max())
    return np.inf if np.isnan(largest) else largest
