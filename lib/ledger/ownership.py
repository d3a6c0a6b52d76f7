"""Ownership: a run belongs to one live process, by a file lock that dies with the process."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from lib.errors import MachineError

__all__ = ["LOCK_NAME", "HeldError", "is_held", "shown_status", "take_lock", "uuid_in_lock"]

LOCK_NAME = ".lock"
# Who only looks has the lock for a moment, in which nobody can take it: `is_held`.
_LOOKED_AT_SECONDS = 0.1
_PAUSE_SECONDS = 0.005


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
    until = time.monotonic() + _LOOKED_AT_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= until:
                lock.close()
                raise HeldError from None
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            lock.close()
            raise MachineError(f"{path}: {error.strerror}") from None


def is_held(folder: Path) -> bool | None:
    """Return whether a live process holds the lock of a run's folder.

    None if that cannot be told, as in a folder of another user. Who goes on then takes the lock, or
    reads the folder, and is told why it cannot.
    """
    try:
        with (folder / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    return False


def shown_status(status: str, folder: Path) -> str:
    """Return the status of a run, `killed` if it is running and no live process holds its folder.

    Of a folder that this user may not read, it is not known. To be asked right after the status was
    read: a run that ends in between looks killed.
    """
    return "killed" if status == "running" and is_held(folder) is False else status


def uuid_in_lock(folder: Path) -> str | None:
    """Return the uuid of the run that a folder was made for; None if its lock does not say it."""
    try:
        said = (folder / LOCK_NAME).read_text("utf-8", "replace")
    except OSError:
        return None
    return said.splitlines()[-1].partition(" ")[0] if said else None
