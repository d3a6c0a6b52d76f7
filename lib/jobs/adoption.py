"""Adoption: finished files that the database does not list are listed, or named and kept aside.

A kill between rename and commit leaves such a file, and so does a database that was restored from
an older copy. Work is never deleted: only temporary files of attempts that have ended are. A file
that is kept aside gets a hidden name, so that who reads the folder as one table does not read it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from lib.files import disk_errors
from lib.ledger.checkpoints import FinishedFile, FinishedStretch, attempt_of, leftovers
from lib.ledger.commit import add_checkpoint
from lib.ledger.identity import (
    first_difference,
    identity_in_footer,
    identity_on_record,
    run_columns,
)
from lib.ledger.reuse_plan import ReusePlan
from lib.ledger.runs import Ownership
from lib.ledger.unlisted import opened_unlisted
from lib.sequences.describing import describe_owners
from lib.sequences.inventory import Inventory
from lib.sequences.rearranged import rearranged_records
from lib.sequences.reused import planned_lengths, planned_windows
from schema.parquet import DESCRIBING
from schema.settings import InputSettings
from schema.tables import Checkpoint, Run

__all__ = ["adopt_leftovers", "drop_files"]


@dataclass(frozen=True)
class _Planned:
    """A run, and what tells which records its positions have."""

    run: Run
    rules: InputSettings
    inventory: Inventory
    reuse: ReusePlan | None


def adopt_leftovers(
    engine: Engine,
    ownership: Ownership,
    rules: InputSettings,
    inventory: Inventory,
    reuse: ReusePlan | None,
) -> Iterator[str]:
    """Go through the files of a run's folder that the database does not list; yield a line on each.

    rules: how `inventory` was read; reuse: what the run copies. A file is adopted if it is this
    run's throughout: footer, page checksums, types and every record. Raises MachineError if this
    process has lost the run, or the disk fails.
    """
    run = ownership.run
    planned = _Planned(run, rules, inventory, reuse)
    listed = {checkpoint.path for checkpoint in run.checkpoints}
    for path in leftovers(Path(run.output_folder), listed):
        place = f"run {run.id}: {path.name}"
        attempt = attempt_of(path.name)
        if attempt is None:
            try:
                stretch = _verified(planned, path)
            except ValueError as error:
                kept = _kept_aside(path)
                yield f"{place}: not in the database, kept as {kept.name}: {error}"
                continue
            row = add_checkpoint(engine, ownership, stretch, lambda file: file.temporary)
            run.checkpoints.append(row)
            run.checkpoints.sort(key=lambda one: one.first_position)
            yield f"{place}: not in the database, verified and adopted"
        elif attempt >= ownership.attempt_id:
            yield f"{place}: of an attempt that the database does not know, left alone"
        else:
            yield _removed(path, place)


def drop_files(run: Run, damaged: Sequence[Checkpoint]) -> Iterator[str]:
    """Keep the files of damaged checkpoints aside; yield a line on each.

    The checkpoints go off the record when the attempt begins, which is after this.
    """
    for checkpoint in damaged:
        path = Path(run.output_folder) / checkpoint.path
        kept = f", kept as {_kept_aside(path).name}" if os.path.lexists(path) else ""
        yield f"run {run.id}: {checkpoint.path}: dropped{kept}, to be computed again"


def _kept_aside(path: Path) -> Path:
    """Give a file a hidden name in its folder, and return its path there."""
    for number in itertools.count(1):
        kept = path.with_name(f".{path.name}.kept-{number}")
        if not (kept.exists() or kept.is_symlink()):
            with disk_errors(path):
                path.rename(kept)
            return kept
    raise AssertionError("unreachable")


def _removed(path: Path, place: str) -> str:
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    return f"{place}: unfinished, removed"


def _verified(planned: _Planned, path: Path) -> FinishedStretch:
    """Return a file as a stretch of a run; raises ValueError with the first thing that differs."""
    with opened_unlisted(path) as file:
        found, footer = file.state, file.footer
        positions = _check_footer(planned.run, footer)
        source = _source_run(planned, footer, positions)
        _check_rows(planned, file.parquet, positions)
        records, digest = file.parquet.metadata.num_rows, file.sha256()
    reused = None if planned.reuse is None else planned.reuse.reused
    lengths = planned_lengths(planned.inventory, reused)
    residues = int(lengths[positions.start : positions.stop].sum(dtype=np.int64))
    seconds = footer.get("seconds")
    return FinishedStretch(
        FinishedFile(path, (found.st_dev, found.st_ino), records, found.st_size, digest),
        positions,
        residues if source is None else 0,
        float(seconds) if isinstance(seconds, int | float) else 0.0,
        source,
        None if source is None else residues,
    )


def _check_footer(run: Run, footer: dict[str, Any]) -> range:
    """Return the positions that a footer names, if it is of this run and nobody has them."""
    difference = first_difference(identity_on_record(run), identity_in_footer(footer))
    if difference:
        key, was, now = difference
        raise ValueError(f"{key} is {was} in the database, {now} in its footer")
    first, stop = footer.get("first_position"), footer.get("stop_position")
    if not (isinstance(first, int) and isinstance(stop, int)):
        raise ValueError("its footer names no positions")
    if not 0 <= first < stop <= run.sequences_total:
        raise ValueError(f"positions {first} to {stop} of {run.sequences_total}")
    for checkpoint in run.checkpoints:
        if checkpoint.first_position < stop and first < checkpoint.stop_position:
            raise ValueError(f"{checkpoint.path} has some of its positions {first} to {stop}")
    return range(first, stop)


def _source_run(planned: _Planned, footer: dict[str, Any], positions: range) -> int | None:
    """Return the run that a file was copied from, None if it was computed.

    Raises ValueError unless the plan copies all of its positions from that run.
    """
    reused = footer.get("reused")
    if reused is None:
        return None
    sources = planned.reuse.sources if planned.reuse is not None else []
    planned_runs = {
        source.run_id: source.run_uuid
        for source in sources
        if source.positions.start < positions.stop and positions.start < source.positions.stop
    }
    found = {reused.get("run"): reused.get("uuid")} if isinstance(reused, dict) else {}
    if not found or planned_runs != found or positions.stop > sources[-1].positions.stop:
        raise ValueError("copied from another run than the plan of reuse says")
    return next(iter(planned_runs))


def _check_rows(planned: _Planned, parquet: pq.ParquetFile, positions: range) -> None:
    """Read every page of a file, and compare its records with those of the plan."""
    columns = run_columns(planned.run)
    describing = [name for name in DESCRIBING.names if name in columns.names]
    if not parquet.schema_arrow.equals(columns):
        raise ValueError("its columns are not those of the run")
    parts = [pa.Table.from_batches([], columns).select(describing)]
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, use_threads=False)
        table.validate(full=True)
        parts.append(table.select(describing))
    if not pa.concat_tables(parts).equals(_describing(planned, positions).select(describing)):
        raise ValueError("its records are not those of its positions")


def _describing(planned: _Planned, positions: range) -> pa.Table:
    """Return what describes the records of some positions, read from the input."""
    rules, inventory, reuse = planned.rules, planned.inventory, planned.reuse
    parts = [pa.Table.from_batches([], DESCRIBING)]
    reused = None if reuse is None else reuse.reused
    copied = range(positions.start, min(positions.stop, 0 if reused is None else len(reused)))
    if reused is not None and copied:
        folder = Path(planned.run.output_folder)
        for _, table in rearranged_records(rules, inventory, reused, [copied], folder):
            parts.append(table.select(DESCRIBING.names))
    for window in planned_windows(rules, inventory, reused):
        first = window.first_position
        if first >= positions.stop:
            break
        part = slice(max(0, positions.start - first), max(0, positions.stop - first))
        parts.append(pa.Table.from_batches([describe_owners(window.sequences[part])]))
    return pa.concat_tables(parts)
