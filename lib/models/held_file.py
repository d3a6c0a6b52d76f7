"""A file held open, so that its metadata, digest and tensors are bytes of one and the same file.

A path may lead to another file from one moment to the next. An open file stays what it is, and
what is written into it shows in its times.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from pathlib import Path

from lib.errors import WeightsError

__all__ = ["HeldFile"]


class HeldFile:
    """A regular file that stays open as long as this object lives; `path` is where it was found.

    Raises WeightsError if there is no such file, or if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, a FIFO would be waited for until somebody writes.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise WeightsError(f"{path}: no such file") from None
        except OSError as error:
            raise WeightsError(f"{path}: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._descriptor)
        state = os.fstat(self._descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise WeightsError(f"{path}: neither a file nor a folder")
        self._stamp = _stamp(state)
        self._sha256: str | None = None

    @property
    def open_path(self) -> Path:
        """A path that opens this very file, whatever `path` leads to by now."""
        return Path(f"/dev/fd/{self._descriptor}")

    @property
    def size(self) -> int:
        """How many bytes the file had when it was opened."""
        return self._stamp[2]

    def sha256(self) -> str:
        """Return the SHA-256, as `sha256sum` prints it, computed once; raises OSError."""
        if self._sha256 is None:
            try:
                with self.open_path.open("rb") as file:
                    self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        return self._sha256

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the file was written to, or if `path` leads to another one.

        Device, inode, size and the times of the last write and of the last change of the inode
        are compared.
        """
        try:
            now = _stamp(os.fstat(self._descriptor)), _stamp(self.path.stat())
        except OSError:
            now = None
        if now != (self._stamp, self._stamp):
            raise WeightsError(f"{self.path}: changed while it was being read")


def _stamp(state: os.stat_result) -> tuple[int, int, int, int, int]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
