"""Commit: a finished stretch becomes a checkpoint. This is the one place where that happens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from lib.errors import MachineError
from lib.files import disk_errors, sync_folder
from lib.ledger.checkpoints import FinishedFile, checkpoint_name, checkpoint_number
from lib.ledger.database import transaction, utc_now
from lib.ledger.runs import Ownership, alive
from schema.tables import Checkpoint

__all__ = ["Committer", "FinishedStretch", "add_checkpoint", "rename_into_place"]


@dataclass(frozen=True)
class FinishedStretch:
    """Computed work in a finished file that the database does not list yet.

    positions: places in the plan. residues: embedded in it. seconds: wall time it took.
    """

    file: FinishedFile
    positions: range
    residues: int
    seconds: float


class Committer:
    """Commits the stretches of a run that this process owns, in whatever order they come."""

    def __init__(self, engine: Engine, ownership: Ownership) -> None:
        self._engine = engine
        self._ownership = ownership
        self._folder = Path(ownership.run.output_folder)
        listed = [checkpoint_number(one.path) or 0 for one in ownership.run.checkpoints]
        self._number = max(listed, default=0)

    def commit(self, stretch: FinishedStretch) -> None:
        """Give the file its name, then list it: from here on it exists.

        Raises MachineError if disk or database fail; then the database does not list it.
        """
        self._number += 1
        path = self._folder / checkpoint_name(self._number)
        rename_into_place(stretch.file, path)
        row = add_checkpoint(self._engine, self._ownership, path.name, stretch)
        self._ownership.run.checkpoints.append(row)


def rename_into_place(file: FinishedFile, path: Path) -> None:
    """Give a finished file its name, on disk as well as in memory."""
    with disk_errors(path):
        if path.exists():
            raise MachineError(f"{path}: exists already")
        file.temporary.rename(path)
        sync_folder(path.parent)


def add_checkpoint(
    engine: Engine, ownership: Ownership, name: str, stretch: FinishedStretch
) -> Checkpoint:
    """List a checkpoint whose file is in place under `name`; returns its row."""
    row = Checkpoint(
        run_id=ownership.run.id,
        attempt_id=ownership.attempt_id,
        path=name,
        first_position=stretch.positions.start,
        stop_position=stretch.positions.stop,
        records=stretch.file.records,
        residues=stretch.residues,
        seconds=stretch.seconds,
        bytes=stretch.file.bytes,
        sha256=stretch.file.sha256,
        esm2_config=ownership.run.esm2_config,
        committed_at=utc_now(),
    )
    with transaction(engine) as session:
        session.add(row)
        session.execute(alive(ownership.attempt_id, row.committed_at))
    return row
