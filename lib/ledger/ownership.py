"""Ownership: a run belongs to one live process, by a file lock that dies with the process."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from lib.errors import MachineError

__all__ = ["LOCK_NAME", "HeldError", "is_held", "shown_status", "take_lock"]

LOCK_NAME = ".lock"


class HeldError(Exception):
    """Another live process holds the lock."""


def take_lock(folder: Path) -> IO[bytes]:
    """Lock a run's folder until the file is closed or the process ends.

    Raises HeldError if another process has it, MachineError if the folder does not allow it.
    """
    path = folder / LOCK_NAME
    try:
        lock = path.open("ab")
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise HeldError from None
        raise MachineError(f"{path}: {error.strerror}") from None
    return lock


def is_held(folder: Path) -> bool:
    """Return whether a live process holds the lock of a run's folder."""
    try:
        with (folder / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def shown_status(status: str, folder: Path) -> str:
    """Return the status of a run, `killed` if it is running and no live process holds its folder.

    To be asked right after the status was read: a run that ends in between looks killed.
    """
    return "killed" if status == "running" and not is_held(folder) else status
