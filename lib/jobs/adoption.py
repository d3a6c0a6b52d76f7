"""Adoption: finished files that the database does not list are listed, or named and kept aside.

A kill between rename and commit leaves such a file, and so does a database that was restored from
an older copy. Work is never deleted: only temporary files of attempts that have ended are. A file
that is kept aside gets a hidden name, so that who reads the folder as one table does not read it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from lib.files import disk_errors
from lib.ledger.checkpoints import FinishedFile, attempt_of, leftovers
from lib.ledger.commit import FinishedStretch, add_checkpoint
from lib.ledger.footer import footer_of
from lib.ledger.identity import first_difference, run_config, run_identity
from lib.ledger.runs import Ownership
from lib.sequences.inventory import Inventory
from lib.sequences.windows import read_windows
from schema.parquet import checkpoint_columns
from schema.settings import InputSettings
from schema.tables import Checkpoint, Run

__all__ = ["adopt_leftovers", "drop_files"]

# What tells whose vectors a row holds.
_DESCRIBING = ("record", "id", "description", "length", "embedded_length")


def adopt_leftovers(
    engine: Engine, ownership: Ownership, rules: InputSettings, inventory: Inventory
) -> Iterator[str]:
    """Go through the files of a run's folder that the database does not list; yield a line on each.

    rules: how `inventory` was read. A file is adopted if it is this run's throughout: footer, page
    checksums, types and every record. Raises MachineError if this process has lost the run, or
    the disk fails.
    """
    run = ownership.run
    listed = {checkpoint.path for checkpoint in run.checkpoints}
    for path in leftovers(Path(run.output_folder), listed):
        place = f"run {run.id}: {path.name}"
        attempt = attempt_of(path.name)
        if attempt is None:
            try:
                stretch = _verified(run, path, rules, inventory)
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
    """Keep the files of checkpoints aside that are off the record; yield a line on each."""
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


def _verified(run: Run, path: Path, rules: InputSettings, inventory: Inventory) -> FinishedStretch:
    """Return a file as a stretch of a run; raises ValueError with the first thing that differs."""
    if path.is_symlink() or not path.is_file():
        raise ValueError("not a regular file")
    try:
        with path.open("rb") as opened:
            found = os.fstat(opened.fileno())
            with pq.ParquetFile(opened, page_checksum_verification=True) as parquet:
                footer = footer_of(parquet.metadata.metadata)
                positions = _check_footer(run, footer)
                _check_rows(run, parquet, positions, rules, inventory)
            digest = _digest(opened)
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    residues = int(inventory.lengths[positions.start : positions.stop].sum(dtype=np.int64))
    seconds = footer.get("seconds")
    return FinishedStretch(
        FinishedFile(
            path, (found.st_dev, found.st_ino), parquet.metadata.num_rows, found.st_size, digest
        ),
        positions,
        residues,
        float(seconds) if isinstance(seconds, int | float) else 0.0,
    )


def _check_footer(run: Run, footer: dict[str, Any]) -> range:
    """Return the positions that a footer names, if it is of this run and nobody has them."""
    identity = footer.get("identity")
    difference = first_difference(run_identity(run), identity if isinstance(identity, dict) else {})
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


def _check_rows(
    run: Run,
    parquet: pq.ParquetFile,
    positions: range,
    rules: InputSettings,
    inventory: Inventory,
) -> None:
    """Read every page of a file, and compare its records with those of the plan."""
    width = run_config(run).hidden_dim
    columns = checkpoint_columns(run.include, run.repr_layers, width, run.per_tok_dtype)
    if not parquet.schema_arrow.equals(columns):
        raise ValueError("its columns are not those of the run")
    parts = []
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group)
        table.validate(full=True)
        parts.append(table.select(_DESCRIBING))
    found = pa.concat_tables(parts) if parts else columns.empty_table().select(_DESCRIBING)
    if not found.equals(_planned(columns, positions, rules, inventory)):
        raise ValueError("its records are not those of its positions")


def _planned(
    columns: pa.Schema, positions: range, rules: InputSettings, inventory: Inventory
) -> pa.Table:
    """Return the describing columns that a file of `positions` has, read from the input."""
    rows: list[tuple[int, str, str, int, int]] = []
    for window in read_windows(rules, inventory):
        first = window.first_position
        if first >= positions.stop:
            break
        part = slice(max(0, positions.start - first), max(0, positions.stop - first))
        rows += [
            (owner.number, owner.id, owner.description, owner.length, len(sequence.residues))
            for sequence in window.sequences[part]
            for owner in sequence.owners
        ]
    kinds = [columns.field(name) for name in _DESCRIBING]
    values = zip(*rows, strict=True) if rows else [[] for _ in kinds]
    arrays = [pa.array(column, kind.type) for column, kind in zip(values, kinds, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(kinds))


def _digest(opened: io.BufferedReader) -> str:
    opened.seek(0)
    return hashlib.file_digest(opened, "sha256").hexdigest()
