"""Audit: a run's rows and checkpoint files are searched for whatever does not belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lib.errors import IdentityRefusedError
from lib.files import disk_errors, file_sha256
from lib.ledger.checkpoints import checkpoint_number, leftovers
from lib.ledger.footer import TOTALS, columns_of, footer_of, read_footer, read_metadata
from lib.ledger.identity import (
    first_difference,
    identity_in_footer,
    identity_on_record,
    run_columns,
    run_config,
)
from lib.ledger.reuse_plan import check_plan
from lib.sequences.inputs import combined_sha256
from schema.esm2_config import ESM2Config, load_snapshot
from schema.tables import Checkpoint, Run

__all__ = [
    "Finding",
    "audit",
    "audit_completeness",
    "audit_files",
    "differs_from_row",
    "missing_positions",
]


# Of the totals: a user may change a label, and when a run started is no part of what it is.
_COUNTS = tuple(name for name in TOTALS if name not in ("label", "started_at"))


@dataclass(frozen=True)
class Finding:
    """What an audit found wrong with a run.

    `damaged` tells a checkpoint file that is lost or altered (it can be computed again) from a
    difference in identity (it cannot).
    """

    fact: str
    damaged: bool
    checkpoint: Checkpoint | None = None


def audit(run: Run, *, files: bool) -> Iterator[Finding]:
    """Yield what is wrong with a run's metadata, its checkpoints' and, if asked, their files.

    Raises MachineError, as `audit_files` does, for a file that cannot be opened: it may be good.
    """
    try:
        config = run_config(run)
    except IdentityRefusedError as error:
        yield Finding(str(error), damaged=False)
        return
    yield from _audit_run_row(run, config)
    position = 0
    for checkpoint in run.checkpoints:
        facts = list(_audit_row(config, checkpoint))
        if checkpoint.first_position < position or checkpoint.stop_position <= position:
            facts.append("its positions overlap those of another checkpoint")
        position = max(position, checkpoint.stop_position)
        for fact in facts:
            yield Finding(_of(checkpoint, fact), damaged=False, checkpoint=checkpoint)
        if files and not facts:
            yield from _audit_file(run, checkpoint)
    if files:
        yield from _audit_plan(run)
        yield from _audit_leftovers(run)
    if position > run.sequences_total:
        yield Finding(
            f"run {run.id}: checkpoints reach position {position} of {run.sequences_total}",
            damaged=False,
        )


def audit_files(run: Run) -> Iterator[Finding]:
    """Yield what is wrong with the files of a run whose rows have been found good.

    Raises MachineError for a file that cannot be opened: it may be good.
    """
    yield from _audit_plan(run)
    for checkpoint in run.checkpoints:
        yield from _audit_file(run, checkpoint)
    yield from _audit_leftovers(run)


def _audit_run_row(run: Run, config: ESM2Config) -> Iterator[Finding]:
    if run.repr_layers != list(config.repr_layers):
        yield Finding(
            f"run {run.id}: repr_layers is {run.repr_layers} in the row, "
            f"{list(config.repr_layers)} in its model metadata",
            damaged=False,
        )
    if ("contacts" in run.include) != (config.contact_regression_sha256 is not None):
        yield Finding(
            f"run {run.id}: include is {run.include} in the row, contact_regression_sha256 "
            f"{config.contact_regression_sha256} in its model metadata",
            damaged=False,
        )
    if not _inputs_fit(run):
        yield Finding(
            f"run {run.id}: its rows in inputs do not make its input_sha256 and records_total",
            damaged=False,
        )
    if run.model is None:
        yield Finding(f"run {run.id}: model_id is {run.model_id}: no such model", damaged=False)
        return
    snapshot = config.weights_snapshot()
    columns = {key: getattr(run.model, key) for key in snapshot}
    difference = first_difference({key: snapshot[key] for key in columns}, columns)
    if difference:
        key, was, now = difference
        yield Finding(
            f"run {run.id}: {key} is {was} in its model metadata, {now} in models", damaged=False
        )


def _audit_plan(run: Run) -> Iterator[Finding]:
    """Find a lost or altered plan of reuse: without it, positions cannot be told."""
    try:
        check_plan(run)
    except IdentityRefusedError as error:
        yield Finding(str(error), damaged=False)


def _inputs_fit(run: Run) -> bool:
    """Tell whether the files of a run's input follow each other and are those of its row."""
    first = 0
    for number, file in enumerate(run.inputs):
        if (file.number, file.first_record) != (number, first):
            return False
        first += file.records
    digests = [file.sha256 for file in run.inputs]
    return (combined_sha256(digests), first) == (run.input_sha256, run.records_total)


def _audit_row(config: ESM2Config, checkpoint: Checkpoint) -> Iterator[str]:
    try:
        found = load_snapshot(checkpoint.esm2_config)
    except ValueError as error:
        yield str(error)
        return
    difference = first_difference(config.snapshot(), found.snapshot())
    if difference:
        key, was, now = difference
        yield f"{key} is {was} in the run, {now} in the checkpoint's row"
    if checkpoint_number(checkpoint.path) is None:
        yield f"path {checkpoint.path!r} is not a checkpoint's name"


def _audit_file(run: Run, checkpoint: Checkpoint) -> Iterator[Finding]:
    path = Path(run.output_folder) / checkpoint.path
    try:
        metadata = _metadata(path)
        footer, columns = footer_of(metadata.metadata), columns_of(metadata)
    except ValueError as error:
        yield Finding(_of(checkpoint, str(error)), damaged=True, checkpoint=checkpoint)
        return
    difference = first_difference(*_repeated(run, checkpoint, footer))
    if difference:
        key, was, now = difference
        fact = f"{key} is {was} in the database, {now} in the file's footer"
        yield Finding(_of(checkpoint, fact), damaged=False, checkpoint=checkpoint)
        return
    if not columns.equals(run_columns(run)):
        fact = "its columns are not those of the run"
        yield Finding(_of(checkpoint, fact), damaged=False, checkpoint=checkpoint)
        return
    try:
        size, digest = path.stat().st_size, file_sha256(path)
    except OSError as error:
        yield Finding(_of(checkpoint, str(error.strerror)), damaged=True, checkpoint=checkpoint)
        return
    if (size, digest) != (checkpoint.bytes, checkpoint.sha256):
        fact = f"its bytes do not match their digest ({size} bytes, sha256 {digest})"
        yield Finding(_of(checkpoint, fact), damaged=True, checkpoint=checkpoint)


def _repeated(
    run: Run, checkpoint: Checkpoint, footer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the rows of a checkpoint and of its run say, and what its footer repeats of it.

    Footers of earlier versions repeat less, and rows of earlier versions have less.
    """
    expected = identity_on_record(run) | {
        "first_position": checkpoint.first_position,
        "stop_position": checkpoint.stop_position,
        "reused_run_id": checkpoint.reused_run_id,
    }
    found, reused = identity_in_footer(footer), footer.get("reused")
    found |= {key: footer.get(key) for key in ("first_position", "stop_position")}
    found["reused_run_id"] = reused.get("run") if isinstance(reused, dict) else None
    totals = footer.get("totals")
    told = {**(totals if isinstance(totals, dict) else {}), **footer}
    counts = {"records": checkpoint.records} | {key: getattr(run, key) for key in _COUNTS}
    for key, value in counts.items():
        if key in told and value is not None:
            expected[key], found[key] = value, told[key]
    return expected, found


def differs_from_row(run: Run, checkpoint: Checkpoint, path: Path) -> str | None:
    """Return how a file differs from what the row of a checkpoint says; its pages are not read.

    Raises MachineError for one that cannot be opened.
    """
    try:
        with disk_errors(path):
            if path.is_file() and path.stat().st_size != checkpoint.bytes:
                return f"{path.stat().st_size} bytes, {checkpoint.bytes} in the database"
        footer = footer_of(_metadata(path).metadata)
    except ValueError as error:
        return str(error)
    identity = footer.get("identity")
    uuid = identity.get("uuid") if isinstance(identity, dict) else None
    if uuid != run.uuid:
        return f"made by run uuid {uuid}"
    positions = footer.get("first_position"), footer.get("stop_position")
    if positions != (checkpoint.first_position, checkpoint.stop_position):
        return "its footer has other positions than the database"
    return None


def _metadata(path: Path) -> pq.FileMetaData:
    """Return the footer of a checkpoint file.

    Raises ValueError for a file that is lost or altered, MachineError for one that cannot be
    opened.
    """
    with disk_errors(path):
        if path.is_symlink() or not path.is_file():
            return read_metadata(path)  # which says what it is
        file = path.open("rb")
    with file:
        return read_metadata(path, file)


def _audit_leftovers(run: Run) -> Iterator[Finding]:
    """Find checkpoints of another run in the folder: who reads it as a table would get them."""
    listed = {checkpoint.path for checkpoint in run.checkpoints}
    for path in leftovers(Path(run.output_folder), listed):
        try:
            identity = read_footer(path).get("identity")
        except ValueError:  # unfinished
            continue
        if isinstance(identity, dict) and identity.get("uuid") != run.uuid:
            fact = f"run {run.id}: {path.name}: made by run uuid {identity.get('uuid')}"
            yield Finding(fact, damaged=False)


def missing_positions(run: Run) -> list[range]:
    """Return the positions of the plan, ascending, that no checkpoint of a run covers."""
    missing = []
    start = 0
    for checkpoint in run.checkpoints:
        if checkpoint.first_position > start:
            missing.append(range(start, checkpoint.first_position))
        start = max(start, checkpoint.stop_position)
    if start < run.sequences_total:
        missing.append(range(start, run.sequences_total))
    return missing


def audit_completeness(run: Run) -> Iterator[Finding]:
    """Yield what a finished run lacks: positions of its plan, or records of its input."""
    if run.status != "finished":
        return
    missing = missing_positions(run)
    for positions in missing:
        yield Finding(
            f"run {run.id}: finished, but no checkpoint has positions {positions.start} to "
            f"{positions.stop} of {run.sequences_total}",
            damaged=True,
        )
    records = sum(checkpoint.records for checkpoint in run.checkpoints)
    if not missing and records != run.records_total:
        yield Finding(
            f"run {run.id}: finished with {records} records in its checkpoints, "
            f"{run.records_total} in its input",
            damaged=False,
        )


def _of(checkpoint: Checkpoint, fact: str) -> str:
    return f"run {checkpoint.run_id}: {checkpoint.path}: {fact}"
