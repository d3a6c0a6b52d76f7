"""Standard input: copied whole to a file before it is read, so that its run can be resumed.

Until the run is on record, the copy has a temporary name in the output folder. Its file lock dies
with the process: what a killed process left is removed by the next that reads standard input there.
In the folder of the run it has a second name. If both are left, the next new run there removes the
second, too, unless the database lists it or the folder was made for another.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from lib.errors import InputError, MachineError
from lib.files import disk_errors, link_new, sync_folder
from lib.sequences.inputs import Source
from lib.sequences.inventory import Inventory
from schema.settings import STANDARD_INPUT, InputSettings

__all__ = [
    "copied_standard_input",
    "drop_names",
    "keep_in_folder",
    "kept_name",
    "remove_unlisted",
    "standard_input_for_now",
]

_BLOCK = 1 << 20
_KEPT = ".stdin-{}.fasta"


@contextmanager
def copied_standard_input(
    rules: InputSettings, folder: Path, stream: BinaryIO | None = None
) -> Iterator[Path | None]:
    """Give a copy of standard input in `folder` if it is part of the input, else None.

    stream: what is copied, if it is not the standard input of this process. At the end of the block
    the copy is removed, unless `keep_in_folder` has given it another name. Raises InputError if
    nothing can be read from standard input, MachineError if the disk fails.
    """
    if STANDARD_INPUT not in (rules.fasta or []):
        yield None
        return
    source = _standard_input() if stream is None else stream
    made = not folder.exists()
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        path, file = _new_file(folder)
        try:
            with file:
                _copy(source, file, path)
                yield path
        finally:
            # A second name that is not on record is found by the first.
            with suppress(OSError):  # the run has it
                if path.stat().st_nlink == 1:
                    path.unlink()
    finally:
        if made:
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()


@contextmanager
def standard_input_for_now(rules: InputSettings) -> Iterator[Path | None]:
    """Give a copy of standard input for the block, in a new folder for temporary files."""
    if STANDARD_INPUT not in (rules.fasta or []):
        yield None
        return
    with ExitStack() as opened:
        with disk_errors(Path(tempfile.gettempdir())):
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="esm-ledger-"))
        yield opened.enter_context(copied_standard_input(rules, Path(folder)))


def keep_in_folder(inventory: Inventory, folder: Path, uuid: str) -> list[Path]:
    """Give the copy of standard input, if there is one, a name in the folder of a run.

    The name is hidden, so that who reads the folder as one table does not read it, and the run's
    own, so that it replaces nothing. Returns the temporary name, which is to go when the run is on
    record. Raises MachineError if the disk fails.
    """
    temporary = []
    for number, file in enumerate(inventory.files):
        if file.source.is_copy:
            path = folder / kept_name(uuid)
            with disk_errors(path):
                if not link_new(file.source.path, path):
                    raise MachineError(f"{path}: exists already")
                sync_folder(folder)
            temporary.append(file.source.path)
            inventory.files[number] = replace(file, source=Source(path, str(path)))
    return temporary


def drop_names(temporary: Sequence[Path]) -> None:
    """Take names from a copy of standard input: the ones that its run does not have."""
    for path in temporary:
        with suppress(OSError):  # there are no links, or it is removed by the next run
            path.unlink()


def remove_unlisted(folder: Path, is_listed: Callable[[Path, str], bool]) -> None:
    """Remove the copies of processes that died after they had named them and before the record.

    folder: the output folder. is_listed: whether some database may have a run that reads a copy, or
    whose UUID begins as its name says.
    """
    for path, found in _dead(folder):
        for kept in folder.glob(f"run-*/{_KEPT.format('*')}"):
            if os.path.samestat(kept.lstat(), found) and not is_listed(
                kept, _uuid_start(kept.name)
            ):
                kept.unlink()
        path.unlink()


def kept_name(uuid: str) -> str:
    """Return the name that the copy of standard input has in the folder of a run."""
    return _KEPT.format(uuid[:8])


def _uuid_start(name: str) -> str:
    start, end = _KEPT.split("{}")
    return name.removeprefix(start).removesuffix(end)


def _standard_input() -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed")
    if sys.stdin.isatty():
        raise InputError("standard input is a terminal: nothing is piped into it")
    return sys.stdin.buffer


def _copy(source: BinaryIO, file: FileIO, path: Path) -> None:
    while block := _read(source):
        with disk_errors(path):
            while block:
                block = block[file.write(block) :]
    with disk_errors(path):
        os.fsync(file.fileno())


def _read(source: BinaryIO) -> memoryview:
    try:
        return memoryview(source.read(_BLOCK))
    except OSError as error:
        raise MachineError(f"standard input: {error.strerror}") from None


def _new_file(folder: Path) -> tuple[Path, FileIO]:
    """Make and lock a temporary file of this process."""
    path = folder / f"{_leftover()}{secrets.token_hex(8)}.tmp"
    with disk_errors(path):
        while True:
            file = path.open("xb", buffering=0)  # closing it has nothing left to write
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have taken it for a leftover before it was locked.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return path, file
            file.close()


def _remove_leftovers(folder: Path) -> None:
    """Remove the copies of processes of this machine that have died, but those with two names."""
    for path, found in _dead(folder):
        if found.st_nlink == 1:
            path.unlink()


def _dead(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the temporary files of processes of this machine that have died, each while locked."""
    for path in folder.glob(f"{_leftover()}*.tmp"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path, os.fstat(file.fileno())


def _leftover() -> str:
    """Return how the names of this machine's temporary files begin: locks may not reach others."""
    return f".stdin-{socket.gethostname()}-"
