"""Claims: a new run takes a folder that no run on record can have, whatever its database.

The lock of a folder says for which run it was made, and of which database, before that run is on
record. So a run that was killed before its first checkpoint keeps its folder. A lock that says
nothing is of an earlier version, and any database may list its run.
"""

from __future__ import annotations

import ast
import fcntl
import itertools
import os
import secrets
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import IO

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from lib.files import disk_errors, rename_new, sync_folder
from lib.ledger.ownership import LOCK_NAME, HeldError, take_lock
from lib.ledger.reuse_plan import plan_name
from lib.ledger.standard_input import kept_name
from schema.tables import Run, SchemaVersion

__all__ = ["claim_folder", "made_for_another"]

_BEGUN = f"{LOCK_NAME}."
_UUID = 36  # characters


def claim_folder(
    session: Session, database: Path, output: Path, uuid: str
) -> tuple[int, Path, IO[bytes]]:
    """Make and lock the folder of a new run; return its number, its path and the lock.

    Takes the next number whose folder is empty, or has nothing but what starts of this database
    left that died before their runs were on record. Raises MachineError if the disk fails.
    """
    mark = _mark(session, database)
    last = session.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'runs'")) or 0
    for number in itertools.count(last + 1):
        folder = output / f"run-{number:06d}"
        with disk_errors(folder), suppress(HeldError):
            if not os.path.lexists(folder):
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            lock = _claimed(session, folder, uuid, mark)
            if lock is not None:
                return number, folder, lock
    raise AssertionError("unreachable")


def made_for_another(folder: Path, database: Path) -> Path | None:
    """Return the database that the folder of a run was made for, if it is there and another one.

    A copy of a database lists the runs of the first.
    """
    lock = folder / LOCK_NAME
    with suppress(OSError, ValueError, SyntaxError, TypeError):  # of an earlier version, or altered
        *_, claim = lock.read_text("utf-8").splitlines()
        _uuid, inode, _made, path = claim.split(" ", 3)
        other = Path(ast.literal_eval(path))
        if other.stat().st_ino == int(inode) and not other.samefile(database):
            return other
    return None


def _mark(session: Session, database: Path) -> str:
    """Return what tells a database from its copies, and from any that had its path, in a line."""
    made = session.scalar(select(func.min(SchemaVersion.created_at)))
    return f"{database.stat().st_ino} {made} {str(database.resolve())!a}"


def _claimed(session: Session, folder: Path, uuid: str, mark: str) -> IO[bytes] | None:
    """Lock a folder for a run; return None if the folder is not free, raise HeldError likewise."""
    if not folder.is_dir():
        return None
    there = {path.name for path in folder.iterdir()}
    begun = {name for name in there if name.startswith(_BEGUN)}
    claim = f"{uuid} {mark}\n".encode()
    if there == begun:
        lock = _new_lock(folder, claim)
    elif _is_of_dead_starts(session, folder, there - begun, mark):
        lock = take_lock(folder)
        _add(claim, lock)
    else:
        return None
    for name in begun:
        (folder / name).unlink(missing_ok=True)
    return lock


def _is_of_dead_starts(session: Session, folder: Path, there: Set[str], mark: str) -> bool:
    """Return whether starts of this database made all that is in a folder, and none got its run."""
    lock = folder / LOCK_NAME
    said = lock.read_text("utf-8", "replace") if lock.is_file() else ""
    *claims, cut_off = said.split("\n")
    uuids, marks = {claim[:_UUID] for claim in claims}, {claim[_UUID:] for claim in claims}
    if cut_off or marks != {f" {mark}"}:
        return False
    left = {LOCK_NAME, *map(kept_name, uuids), *map(plan_name, uuids)}
    listed = select(Run.id).where(Run.uuid.in_(uuids)).limit(1)
    return there <= left and session.scalar(listed) is None


def _new_lock(folder: Path, claim: bytes) -> IO[bytes]:
    """Make the lock of a folder and hold it; it gets its name when the claim is in it, on disk.

    Raises HeldError if another process was faster, OSError if the disk fails.
    """
    begun = folder / f"{_BEGUN}{secrets.token_hex(8)}"
    lock = begun.open("xb")
    try:
        _add(claim, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not rename_new(begun, folder / LOCK_NAME):
            raise HeldError
        sync_folder(folder)
    except BaseException as error:
        lock.close()
        begun.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):  # the faster one has removed it
            raise HeldError from None
        raise
    return lock


def _add(claim: bytes, lock: IO[bytes]) -> None:
    lock.write(claim)
    lock.flush()
    os.fsync(lock.fileno())
