"""Pruning: the files of a run are taken off the disk, and its history stays on record.

First the record says that the run is pruned, then its files go one by one: an interrupted pruning
can be run again. Only a file goes that the database lists and that agrees with its row: a
checkpoint by size and footer, without its digest; standard input by size; a reuse plan by digest.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select, update

from lib.errors import IdentityRefusedError, LedgerError, MachineError, SettingsError
from lib.files import disk_errors
from lib.ledger.audit import differs_from_row
from lib.ledger.checkpoints import attempt_of
from lib.ledger.claims import made_for_another
from lib.ledger.database import (
    open_for_reading,
    open_for_writing,
    transaction,
    utc_ago,
    utc_now,
)
from lib.ledger.ownership import LOCK_NAME, is_held, uuid_in_lock
from lib.ledger.places import StoredRun
from lib.ledger.reuse_plan import check_plan, plan_path
from lib.ledger.runs import end_lost_attempts, hold_lock, load_run, owned_by_another
from lib.ledger.sqlite_file import KNOWN_VERSIONS, connect_read_only
from lib.ledger.standard_input import kept_name
from lib.ledger.whereabouts import write_folder
from lib.units import count, counted, printable, size
from schema.tables import Attempt, Input, Run

__all__ = ["NOT_LISTED", "Pruning", "idle_runs", "prune", "prunings", "try_pruning"]

NOT_LISTED = "not listed"
_NAMED = 5  # files that are not listed are named, and then counted


@dataclass(frozen=True)
class Pruning:
    """What goes of a run's folder, and what stays there.

    was_pruned: whether the record had the run as pruned before. files: the bytes of each file that
    goes, by name. left: why each other stays, by name; NOT_LISTED for what is not the run's.
    """

    run: Run
    was_pruned: bool
    files: dict[str, int]
    left: dict[str, str]

    @property
    def changes_nothing(self) -> bool:
        """Whether the run was pruned to the end before."""
        return self.was_pruned and not self.files

    def describe(self, *, dry_run: bool) -> list[str]:
        """Return lines: what went, or file by file what would go, and what stays and why."""
        place = f"run {self.run.id}"
        removed = f"{counted(len(self.files), 'file')} ({size(sum(self.files.values()))})"
        if self.changes_nothing:
            lines = [f"{place} is pruned already"]
        elif dry_run:
            lines = [f"{place}: would be pruned, {removed} removed from {self.run.output_folder}"]
            lines += [f"  {name}  {size(held)}" for name, held in self.files.items()]
        else:
            lines = [f"{place}: pruned, {removed} removed from {self.run.output_folder}"]
        strange = [name for name, why in self.left.items() if why == NOT_LISTED]
        altered = [(name, why) for name, why in self.left.items() if why != NOT_LISTED]
        if strange:
            more = f" and {count(len(strange) - _NAMED)} more" if len(strange) > _NAMED else ""
            names = ", ".join(strange[:_NAMED])
            lines.append(f"{place}: left, as the run does not list it: {names}{more}")
        return [*lines, *(f"{place}: left {name}: {why}" for name, why in altered)]

    def json(self) -> dict[str, Any]:
        """Return the same for programs."""
        return {
            "run": self.run.id,
            "pruned_at": self.run.pruned_at,
            "output_folder": self.run.output_folder,
            "files": self.files,
            "bytes": sum(self.files.values()),
            "left": self.left,
        }


def prunings(
    url: str,
    wanted: int | timedelta,
    output: Path | None = None,
    *,
    dry_run: bool,
    say: Callable[[str], None],
) -> Iterator[Pruning]:
    """Prune runs of a run database, and yield each when it is done.

    wanted: the number of a run, or all that have been idle for longer and have files; output: as in
    `prune`. dry_run: whether the database is only read, and nothing is changed. `say` is told which
    idle runs are passed over as they have no folder, and what `open_for_writing` tells. Raises what
    `prune` raises.
    """
    with _opened(url, writing=not dry_run, say=say) as engine:
        age = None if isinstance(wanted, int) else wanted
        pruned = try_pruning if dry_run else prune
        for run_id in [wanted] if isinstance(wanted, int) else idle_runs(engine, wanted):
            try:
                pruning = pruned(engine, run_id, age, output)
            except _NoFolderError as error:
                if age is None:
                    raise
                say(str(error))
                continue
            if pruning is not None and not (age is not None and pruning.changes_nothing):
                yield pruning


@contextmanager
def _opened(url: str, *, writing: bool, say: Callable[[str], None]) -> Iterator[Engine]:
    if writing:
        with open_for_writing(url, create=False, say=say) as engine:
            yield engine
        return
    engine = open_for_reading(url)
    try:
        yield engine
    finally:
        engine.dispose()


def idle_runs(engine: Engine, age: timedelta) -> list[int]:
    """Return the runs, oldest first, whose last sign of life is older and that no process owns.

    A pruned run is among them if something is left of its folder.
    """
    found = []
    for run_id in _idle(engine, age):
        run = load_run(engine, run_id)
        folder = Path(run.output_folder)
        if not is_held(folder) and (run.pruned_at is None or folder.exists()):
            found.append(run_id)
    return found


def try_pruning(
    engine: Engine, run_id: int, age: timedelta | None = None, output: Path | None = None
) -> Pruning:
    """Return what `prune` would do, and change nothing; raises what it raises."""
    run = _load(engine, run_id, output)
    _refuse_lost(run, age)
    _refuse_another_databases(engine, run)
    return _examined(engine, run)


def prune(
    engine: Engine, run_id: int, age: timedelta | None = None, output: Path | None = None
) -> Pruning | None:
    """Record a run as pruned and remove its files; run it again if it was cut short.

    age: None, or do nothing and return None if the last sign of life of the run is not older: it
    may have been continued meanwhile. output: where its folder lies, as in `load_run`, which is
    recorded, too. Raises SettingsError if there is no such run, or its folder on record is there
    and is not `output`, or is that of another database, of which this is a copy; MachineError if a
    live process owns it, its disk seems not to be mounted, its folder cannot be written to or the
    disk fails; and what `given_folder` raises.
    """
    folder = Path(_load(engine, run_id, output).output_folder)
    with _held(engine, run_id, folder):
        run = load_run(engine, run_id, output)
        if age is not None and run_id not in _idle(engine, age):
            return None
        _refuse_lost(run, age)
        _refuse_another_databases(engine, run)
        pruning = _examined(engine, run)
        _record(engine, run)
        # The folder of a run that was pruned before may be another run's by now.
        lock = [LOCK_NAME] if uuid_in_lock(folder) in (run.uuid, None) else []
        try:
            for name in [*pruning.files, *lock]:
                _remove(folder / name)
        except MachineError as error:
            fact = f"run {run_id}: recorded as pruned, files are left (make prune RUN={run_id})"
            raise MachineError(f"{fact}: {error}") from None
        with suppress(OSError):  # something is left there
            folder.rmdir()
    return pruning


def _load(engine: Engine, run_id: int, output: Path | None) -> Run:
    """Return a run that no process owns; with `output`, its folder on record has moved there.

    A run is not recorded as pruned for a copy of its folder.
    """
    run = load_run(engine, run_id)
    on_record = Path(run.output_folder)
    if is_held(on_record):
        raise owned_by_another(run)
    if output is None:
        return run
    run = load_run(engine, run_id, output)
    folder = Path(run.output_folder)
    if is_held(folder):
        raise owned_by_another(run)
    if on_record.is_dir() and not on_record.samefile(folder):
        fact = f"output folder {folder}: not the one on record, which is there: {on_record}"
        raise SettingsError(f"run {run_id}: {fact}")
    return run


def _idle(engine: Engine, age: timedelta) -> list[int]:
    """Return the runs without a sign of life since, oldest first.

    Every attempt writes one when it starts and when it ends.
    """
    newest = select(func.max(Attempt.heartbeat_at)).where(Attempt.run_id == Run.id)
    last = func.coalesce(newest.scalar_subquery(), Run.started_at)
    query = select(Run.id).where(last < utc_ago(age)).order_by(Run.id)
    with transaction(engine) as session:
        return list(session.scalars(query))


class _NoFolderError(MachineError):
    """The files of a run are not there, and may be on a disk that is not mounted."""


def _refuse_lost(run: Run, age: timedelta | None) -> None:
    """Raise _NoFolderError if the folder of a run is not there, which may come back.

    age: None, or let a run be pruned whose folder alone is lost: its user has named it.
    """
    if run.pruned_at is not None:
        return
    folder = Path(run.output_folder)
    place = folder.parent if age is None else folder
    with disk_errors(place):
        is_there = place.is_dir()
    if not is_there:
        raise _NoFolderError(f"run {run.id}: output folder {place}: no such folder")


def _refuse_another_databases(engine: Engine, run: Run) -> None:
    """Raise SettingsError if this database is a copy of one that has the very folder of a run."""
    folder = Path(run.output_folder)
    other = made_for_another(folder, Path(engine.url.database or ""))
    if other is not None and _lists(other, run.uuid, folder):
        raise SettingsError(f"run {run.id}: output folder {folder} is that of database {other}")


def _lists(database: Path, uuid: str, folder: Path) -> bool:
    """Return whether a database has a run in a folder, or cannot be asked."""
    try:
        with closing(connect_read_only(database, KNOWN_VERSIONS)) as connection:
            connection.row_factory = sqlite3.Row
            columns = "id, uuid, output_folder, settings"
            query = f"SELECT {columns} FROM runs WHERE uuid = ?"
            row = connection.execute(query, [uuid]).fetchone()
        return row is not None and StoredRun.of_row(row).folder(database).samefile(folder)
    except FileNotFoundError:
        return False
    except (LedgerError, sqlite3.Error, OSError):
        return True


@contextmanager
def _held(engine: Engine, run_id: int, folder: Path) -> Iterator[None]:
    """Hold the lock of a run; without its folder there is none to hold."""
    with disk_errors(folder):
        is_there = folder.is_dir()
    if not is_there:
        yield
        return
    with hold_lock(engine, run_id, folder):
        yield


def _record(engine: Engine, run: Run) -> None:
    """Record where a run lies and that it is pruned. An attempt that has not ended is lost."""
    now = utc_now()
    with transaction(engine) as session:
        write_folder(session, run.id, Path(run.output_folder), Path(engine.url.database or ""))
        if run.pruned_at is not None:
            return
        session.execute(update(Run).where(Run.id == run.id).values(pruned_at=now))
        end_lost_attempts(session, run.id)
    run.pruned_at = now


def _remove(path: Path) -> None:
    with disk_errors(path):
        path.unlink(missing_ok=True)


def _examined(engine: Engine, run: Run) -> Pruning:
    """Go through the folder of a run and tell what goes from what stays.

    Raises MachineError if no file can be removed from there.
    """
    folder = Path(run.output_folder)
    files, left = dict[str, int](), dict[str, str]()
    listed = _Listed(engine, run)
    with disk_errors(folder):
        # Before the run is recorded as pruned. A trial file would not fit on a full disk.
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise MachineError(f"{folder}: not writable")
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name == LOCK_NAME:
                continue
            found = path.lstat()
            why = listed.why_left(path, found)
            if why is None:
                files[path.name] = found.st_size
            else:
                left[printable(path.name)] = why
    return Pruning(run, run.pruned_at is not None, files, left)


class _Listed:
    """The files that the database lists for a run; the names of temporary ones tell the attempt."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self._engine, self._run = engine, run
        self._on_record = Path(load_run(engine, run.id).output_folder)
        self._checkpoints = {one.path: one for one in run.checkpoints}
        self._inputs = {Path(one.path).name: one for one in run.inputs}
        # 0: of versions before the attempt was part of the name.
        self._attempts = {0, *(attempt.id for attempt in run.attempts)}

    def why_left(self, path: Path, found: os.stat_result) -> str | None:
        """Return why a file in the folder of the run stays; None if it goes."""
        run, name = self._run, path.name
        checkpoint = self._checkpoints.get(name)
        kept = self._inputs.get(name) if name == kept_name(run.uuid) else None
        is_plan = name == plan_path(run).name and run.reuse_sha256 is not None
        if not (checkpoint or kept or is_plan or attempt_of(name) in self._attempts):
            return NOT_LISTED
        if not stat.S_ISREG(found.st_mode):
            return "not a regular file"
        if checkpoint is not None:
            return differs_from_row(run, checkpoint, path)
        if kept is not None:
            return self._why_input_stays(kept, path, found)
        if is_plan:
            try:
                check_plan(run)
            except IdentityRefusedError:
                return "its bytes do not match their digest"
        return None

    def _why_input_stays(self, kept: Input, path: Path, found: os.stat_result) -> str | None:
        """Return why the copy of standard input stays: altered, or the input of another run."""
        if found.st_size != kept.bytes:
            return f"{found.st_size} bytes, {kept.bytes} in the database"
        others = (
            select(Input.run_id)
            .join(Run, Run.id == Input.run_id)
            .where(Input.sha256 == kept.sha256, Run.id != kept.run_id, Run.pruned_at.is_(None))
            .order_by(Run.id)
            .distinct()
        )
        with transaction(self._engine) as session:
            listed = list(session.scalars(others))
        for run_id in listed:
            for other in load_run(self._engine, run_id).inputs:
                if Path(other.path) == self._on_record / path.name:  # which may have moved
                    return f"input of run {run_id}"
                with suppress(OSError):
                    if path.samefile(other.path):
                        return f"input of run {run_id}"
        return None
