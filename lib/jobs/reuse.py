"""Reuse: what earlier runs embedded already is found by the SHA-256 of its residues.

The digests of the input are sorted, those of one source file after another are looked up among
them. Memory holds SEARCH_BYTES for each different sequence of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sqlalchemy import Engine

from lib.embeddings.verified import ListedFile, VerifiedFile, verified_file
from lib.errors import IdentityRefusedError, MachineError, SettingsError
from lib.ledger.audit import Finding, audit
from lib.ledger.history import refuse_pruned
from lib.ledger.identity import (
    first_difference,
    identity_in_footer,
    identity_on_record,
    run_columns,
)
from lib.ledger.reuse_plan import ReusePlan, Source
from lib.ledger.runs import load_run
from lib.ledger.sources import Wanted, has_sources, source_runs
from lib.models.detection import Detection
from lib.sequences.digests import first_halves
from lib.sequences.inventory import Inventory
from lib.sequences.reused import Reused
from lib.settings import Settings
from lib.units import count
from schema.esm2_config import ESM2Config
from schema.parquet import EMBEDDED_SHA256
from schema.tables import Checkpoint, Run

__all__ = [
    "SEARCH_BYTES",
    "LostSourceError",
    "SourceFiles",
    "describe_reuse",
    "may_reuse",
    "plan_reuse",
    "verified_source",
]

# For each different sequence: its digest 16, its place in their order 8, what they are sorted by 8,
# file and row 4 each, and whether it is found 2 while a file is looked through.
SEARCH_BYTES = 42


def may_reuse(engine: Engine, settings: Settings, detection: Detection) -> bool:
    """Return whether any earlier run could be copied from, as far as is known without a digest."""
    return settings.output.reuse and has_sources(engine, settings, asdict(detection.shape))


def plan_reuse(
    engine: Engine,
    settings: Settings,
    config: ESM2Config,
    inventory: Inventory,
    say: Callable[[str], None],
) -> ReusePlan | None:
    """Decide what a new run copies from earlier ones; None if that is nothing.

    inventory: with digests if the settings say reuse, which are dropped here. The newest run that
    has a sequence is copied from. No vector is read; what is copied is verified then. `say` is told
    how much is reused, and what is not although it looks alike. Raises MachineError if the database
    fails.
    """
    if not settings.output.reuse:
        return None
    assert inventory.digests is not None
    search = _Search(inventory.digests)
    inventory.digests = None
    without: list[int] = []
    for run, checkpoints, faults in source_runs(engine, Wanted(config, settings)):
        if run is not None and not run.has_digests:
            without.append(run.id)
        elif run is not None:
            faults = [*faults, *search.look_into(run, checkpoints)]
        if faults:
            more = f" (and {count(len(faults) - 1)} more of this run)" if len(faults) > 1 else ""
            say(f"not reused: {faults[0]}{more}")
        if not search.missing:
            break
    if without:
        say(f"not reused: {_runs(without)}, whose files have no {EMBEDDED_SHA256}")
    plan = search.plan(inventory)
    if plan is not None:
        say(describe_reuse(plan, inventory))
    return plan


def describe_reuse(plan: ReusePlan, inventory: Inventory) -> str:
    """Return one line with how much of an input is copied, and from which runs."""
    return (
        f"reused: {count(len(plan))} of {count(inventory.sequences)} sequences, "
        f"from {_runs(plan.run_ids)}"
    )


class LostSourceError(Exception):
    """A file that a plan copies from is not there any more as it was."""


class SourceFiles:
    """The files that a plan copies from, each checked before it is read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._run: Run | None = None
        self._findings: list[Finding] = []

    def verified(self, source: Source) -> VerifiedFile:
        """Return the file of a source: its row, its footer and all its bytes are those of the plan.

        Raises LostSourceError if it is lost or altered, MachineError if the database fails.
        """
        run = self._load(source)
        place = f"run {run.id}: {source.file}"
        checkpoint = next((one for one in run.checkpoints if one.path == source.file), None)
        if checkpoint is None:
            raise LostSourceError(f"{place}: not in the database")
        if run.uuid != source.run_uuid or checkpoint.sha256 != source.sha256:
            raise LostSourceError(f"{place}: another file since reuse was planned")
        for finding in self._findings:
            if finding.checkpoint in (None, checkpoint):
                raise LostSourceError(finding.fact)
        try:
            return verified_source(run, checkpoint, digest=True)
        except (IdentityRefusedError, MachineError) as error:
            raise LostSourceError(str(error)) from None

    def _load(self, source: Source) -> Run:
        if self._run is None or self._run.id != source.run_id:
            try:
                run = load_run(self._engine, source.run_id)
                refuse_pruned(run.id, run.pruned_at)
            except (IdentityRefusedError, SettingsError) as error:
                raise LostSourceError(str(error)) from None
            self._run, self._findings = run, list(audit(run, files=False))
        return self._run


def verified_source(run: Run, checkpoint: Checkpoint, *, digest: bool) -> VerifiedFile:
    """Return the file of a checkpoint, checked against its row and the row of its run.

    digest: whether its SHA-256 is to be compared, too. Raises IdentityRefusedError at the first
    difference, MachineError if the disk fails.
    """
    path = Path(run.output_folder) / checkpoint.path
    row = {key: getattr(run, key) for key in ("id", "uuid", "esm2_config", "input_sha256")}
    listed = ListedFile(
        row, path, checkpoint.bytes, checkpoint.sha256, run_columns(run), checkpoint.records
    )
    verified = verified_file(listed, digest=digest)
    with verified.opened() as file:
        footer = file.footer()
    found, expected = identity_in_footer(footer), identity_on_record(run)
    for key in ("first_position", "stop_position"):
        found[key], expected[key] = footer.get(key), getattr(checkpoint, key)
    difference = first_difference(expected, found)
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"{listed.place}: {key} is {was} in the database, {now} in the file's footer"
        )
    return verified


class _Search:
    """Looks for the sequences of an input in source files, and remembers where each was found."""

    def __init__(self, digests: npt.NDArray[np.uint64]) -> None:
        self._digests = digests
        self._order = np.argsort(digests[:, 0])
        self._keys = digests[self._order, 0]
        self._files: list[tuple[Run, Checkpoint]] = []
        self._file_of = np.full(len(digests), -1, np.int32)
        self._row_of = np.empty(len(digests), np.int32)
        self.missing = len(digests)

    def look_into(self, run: Run, checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
        """Look for sequences that have not been found yet; yield what is wrong with files."""
        for checkpoint in checkpoints:
            try:
                there = _digests(verified_source(run, checkpoint, digest=False))
            except (IdentityRefusedError, MachineError) as error:
                yield str(error)
            else:
                self._find(run, checkpoint, there)

    def _find(self, run: Run, checkpoint: Checkpoint, there: npt.NDArray[np.uint64]) -> None:
        """Look for the sequences of a file, by the digests of its rows."""
        at = np.searchsorted(self._keys, there[:, 0])
        at[at == len(self._keys)] = 0
        wanted = self._order[at]
        new = (self._digests[wanted] == there).all(1) & (self._file_of[wanted] < 0)
        rows = np.flatnonzero(new)[::-1]  # a sequence may be in several rows: the first stays
        if len(rows):
            self._file_of[wanted[rows]] = len(self._files)
            self._row_of[wanted[rows]] = rows
            self._files.append((run, checkpoint))
            self.missing = int(np.count_nonzero(self._file_of < 0))

    def plan(self, inventory: Inventory) -> ReusePlan | None:
        """Return what was found, file after file, by row; None if that is nothing."""
        del self._order, self._keys, self._digests
        found = np.flatnonzero(self._file_of >= 0)
        if not len(found):
            return None
        found = found[np.lexsort((self._row_of[found], self._file_of[found]))]
        stops = np.cumsum(np.bincount(self._file_of[found])).tolist()
        sources = [
            Source(run.id, run.uuid, checkpoint.path, checkpoint.sha256, range(start, stop))
            for (run, checkpoint), start, stop in zip(self._files, [0, *stops], stops, strict=False)
        ]
        records = inventory.first_records()[found]
        return ReusePlan(sources, Reused(records, inventory.records), self._row_of[found])


def _digests(file: VerifiedFile) -> npt.NDArray[np.uint64]:
    """Return (rows, 2) the first half of each row's digest; raises IdentityRefusedError."""
    parts = [np.empty((0, 2), np.uint64)]
    with file.opened() as checkpoint:
        for group in checkpoint.row_groups:
            table = checkpoint.read(group, [EMBEDDED_SHA256])
            if table.schema.types != [pa.binary(32)] or table.column(0).null_count:
                raise IdentityRefusedError(f"{file.listed.place}: no column {EMBEDDED_SHA256}")
            for chunk in table.column(0).chunks:
                held = memoryview(chunk.buffers()[1])
                parts.append(
                    first_halves(held[chunk.offset * 32 : (chunk.offset + len(chunk)) * 32])
                )
    return np.concatenate(parts)


def _runs(numbers: list[int]) -> str:
    """Return `run 3`, `runs 3 and 7` or `runs 1, 3 and 7`."""
    *most, last = map(str, sorted(numbers))
    return f"runs {', '.join(most)} and {last}" if most else f"run {last}"
