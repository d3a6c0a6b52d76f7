"""The disk: what is new is whole under its name or not there, and what is refused is one line."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from lib.errors import MachineError, SettingsError

__all__ = ["disk_errors", "new_path", "sync_folder"]


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a MachineError that names the file."""
    try:
        yield
    except pa.ArrowException as error:
        raise MachineError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from None


@contextlib.contextmanager
def new_path(
    path: Path, *, folder: bool, replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was made there is synced and takes that name.

    With `folder` it is an empty folder, whose files are flat. Nothing that exists is replaced
    but a file that is `replaceable`, and nothing is left of work that failed.

    Raises SettingsError if `path` exists or its folder does not, MachineError for the disk.
    """
    _refuse_existing(path, replaceable)
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent}: no such folder")
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with disk_errors(path):
            if folder:
                temporary.mkdir()
            else:
                temporary.touch(exist_ok=False)
            yield temporary
            for file in temporary.iterdir() if folder else [temporary]:
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if folder:
                sync_folder(temporary)
            _refuse_existing(path, replaceable)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _refuse_existing(path: Path, replaceable: Callable[[Path], bool] | None) -> None:
    if (path.exists() or path.is_symlink()) and not (replaceable and replaceable(path)):
        raise SettingsError(f"{path}: exists already")
