"""Commit: a finished stretch becomes a checkpoint. This is the one place where that happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from lib.errors import MachineError
from lib.files import disk_errors, rename_new, sync_folder
from lib.ledger.checkpoints import (
    FinishedFile,
    FinishedStretch,
    checkpoint_name,
    checkpoint_number,
)
from lib.ledger.database import transaction, utc_now
from lib.ledger.runs import Ownership, show_alive
from schema.tables import Checkpoint, Worker

__all__ = ["Committer", "add_checkpoint", "rename_into_place"]


class Committer:
    """Commits the stretches of a run that this process owns, in whatever order they come."""

    def __init__(self, engine: Engine, ownership: Ownership) -> None:
        self._engine = engine
        self._ownership = ownership
        self._folder = Path(ownership.run.output_folder)
        listed = [checkpoint_number(one.path) or 0 for one in ownership.run.checkpoints]
        self._number = max(listed, default=0)

    def commit(self, stretch: FinishedStretch) -> None:
        """Give the file its name and list it in one transaction: from here on it exists.

        A process that has lost the run renames nothing. Raises MachineError if it has, or if disk
        or database fail; then the database does not list the file.
        """
        row = add_checkpoint(self._engine, self._ownership, stretch, self._place)
        self._ownership.run.checkpoints.append(row)

    def _place(self, file: FinishedFile) -> Path:
        """Rename a file to the first number that no file has; return its path."""
        while True:
            self._number += 1
            path = self._folder / checkpoint_name(self._number)
            if rename_into_place(file, path):
                return path


def rename_into_place(file: FinishedFile, path: Path) -> bool:
    """Give a finished file its name, on disk as well as in memory; return False if it is taken.

    Raises MachineError if the temporary name is not the file's any more.
    """
    with disk_errors(path):
        _refuse_replaced(file, file.temporary)
        if not rename_new(file.temporary, path):
            return False
        _refuse_replaced(file, path)
        sync_folder(path.parent)
    return True


def _refuse_replaced(file: FinishedFile, path: Path) -> None:
    found = path.stat()
    if (found.st_dev, found.st_ino) != file.inode:
        raise MachineError(f"{path}: another file has taken its place")


def add_checkpoint(
    engine: Engine,
    ownership: Ownership,
    stretch: FinishedStretch,
    place: Callable[[FinishedFile], Path],
) -> Checkpoint:
    """List a stretch whose file `place` gives its name; returns the row.

    All of it is one transaction, whose write lock keeps other owners of this run out. Raises
    MachineError if this process has lost the run, or a checkpoint has some of the positions.
    """
    with transaction(engine) as session:
        show_alive(session, ownership)
        _refuse_overlap(session, ownership, stretch.positions)
        row = _row(ownership, place(stretch.file).name, stretch)
        session.add(row)
        if stretch.worker_id is not None:
            worker = update(Worker).where(Worker.id == stretch.worker_id)
            session.execute(worker.values(seen_at=row.committed_at))
        session.flush()
    return row


def _refuse_overlap(session: Session, ownership: Ownership, positions: range) -> None:
    found = session.scalar(
        select(Checkpoint.path).where(
            Checkpoint.run_id == ownership.run.id,
            Checkpoint.first_position < positions.stop,
            Checkpoint.stop_position > positions.start,
        )
    )
    if found is not None:
        raise MachineError(
            f"run {ownership.run.id}: {found} has positions of {positions.start} to "
            f"{positions.stop} already"
        )


def _row(ownership: Ownership, name: str, stretch: FinishedStretch) -> Checkpoint:
    return Checkpoint(
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
        reused_run_id=stretch.reused_run_id,
        residues_reused=stretch.residues_reused,
        worker_id=stretch.worker_id,
    )
