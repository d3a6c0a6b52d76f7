"""Files: digests, and new files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from lib.errors import MachineError, SettingsError

__all__ = [
    "disk_errors",
    "do_not_keep",
    "file_md5",
    "file_sha256",
    "link_new",
    "listing_sha256",
    "new_path",
    "refuse_existing",
    "rename_new",
    "sync_folder",
]

# Of a file system that has no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_md5(path: Path) -> str:
    """Return the MD5 of a file, as `md5sum` prints it; raises OSError."""
    with path.open("rb") as file:
        made = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        return made.hexdigest()


def listing_sha256(entries: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 of what `sha256sum` prints for (digest, name) entries."""
    listing = hashlib.sha256()
    for digest, name in entries:
        listing.update(f"{digest}  {name}\n".encode())
    return listing.hexdigest()


def do_not_keep(file: IO[bytes]) -> None:
    """Ask the system not to keep an open file in memory at the cost of anything else.

    A file that is read twice would otherwise count as in use, and drive out the code of this
    process. Linux does so from version 6.3 on; where there is room, the file stays in memory.
    """
    with contextlib.suppress(AttributeError, OSError):  # no such hint here, or not for such a file
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NOREUSE)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_new(path: Path, to: Path) -> bool:
    """Rename a file without replacing anything; return False if `to` exists. Raises OSError."""
    if not link_new(path, to):
        return False
    with contextlib.suppress(FileNotFoundError):  # there are no links
        path.unlink()
    return True


def link_new(path: Path, to: Path) -> bool:
    """Give a file a second name without replacing anything; return False if `to` exists.

    Where the file system has no links, the first name is lost. Raises OSError.
    """
    try:
        os.link(path, to)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if to.exists():
            return False
        path.rename(to)
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of Arrow into a MachineError that names `path`."""
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
    """Yield a temporary path beside `path`, then sync what was written there and rename it.

    With `folder` the temporary path is an empty folder; it may hold files but no folders. An
    existing `path` is replaced only if `replaceable(path)` is true. If the block fails, the
    temporary path is removed.

    Raises SettingsError if `path` exists or its folder does not, MachineError if the disk fails.
    """
    refuse_existing(path, replaceable)
    # Not by a number of this process, which another one in a container may have, too.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    with disk_errors(path):
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
    try:
        with disk_errors(path):
            yield temporary
            for file in temporary.iterdir() if folder else [temporary]:
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            if folder:
                sync_folder(temporary)
            if folder or replaceable is not None:
                refuse_existing(path, replaceable)
                temporary.rename(path)  # which replaces no folder that has files
            elif not rename_new(temporary, path):
                raise _exists(path)
            sync_folder(path.parent)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, replaceable: Callable[[Path], bool] | None = None) -> None:
    """Raise SettingsError for what `new_path` refuses, before work for it is begun."""
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent}: no such folder")
    if (path.exists() or path.is_symlink()) and not (replaceable and replaceable(path)):
        raise _exists(path)


def _exists(path: Path) -> SettingsError:
    return SettingsError(f"{path}: exists already")
