"""Compressed files, read to the last byte: gzip, bzip2, xz and zstd, known by name or first bytes.

If bytes after the first stream do not begin another stream, bz2.open, lzma.open and zstd.open
treat them as the end of the file. In a file of several streams (pbzip2 and pixz write such files)
one damaged byte can then silently lose the rest of the records; here it is an error. Behind a
stream of gzip zeros are padding, and behind one of xz zeros in fours.

A `DigestedRead` takes the digest of the bytes that its reader gets, below the decompressor.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from backports import zstd

from lib.files import do_not_keep

__all__ = ["DigestedRead", "open_decompressed"]

_CHUNK = 1 << 17
# No ordinary file needs a larger one, but a header can ask for 4 GiB before the first byte.
_LARGEST_DICTIONARY = 1 << 28
_BY_FIRST_BYTES = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}


class _Decompressor(Protocol):
    """A decompressor of one stream, as bz2, lzma and zstd have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * _LARGEST_DICTIONARY),
    ".zst": lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 28}),
}


class DigestedRead:
    """One read of a file, to its end, of which the digest is wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: _DigestedFile | None = None

    def open(self) -> io.BufferedReader:
        """Open the file for a read of its bytes as stored; raises OSError."""
        self._file = _DigestedFile(io.FileIO(self.path))
        return io.BufferedReader(self._file, _CHUNK)

    @property
    def bytes_read(self) -> int:
        """How many bytes of the file the last read has got."""
        return 0 if self._file is None else self._file.bytes_read

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes of the last read.

        Raises ValueError if it has not come to the end of the file.
        """
        if self._file is None or not self._file.ended:
            raise ValueError(f"{self.path}: not read to its end")
        return self._file.digest.hexdigest()


class _DigestedFile(io.RawIOBase):
    """A file whose bytes are digested, block by block, before they are handed out."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._block = memoryview(b"")
        self.digest = hashlib.sha256()
        self.bytes_read = 0
        self.ended = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._block:
            self._block = memoryview(self._file.read(_CHUNK))
            self.digest.update(self._block)
            self.bytes_read += len(self._block)
            self.ended = not self._block
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def open_decompressed(
    path: Path, read: DigestedRead | None = None
) -> gzip.GzipFile | io.BufferedReader:
    """Open a file, plain or compressed, to read its content; it is opened once.

    read: of this file, if the read is to be digested. The file's suffix decides how it is read,
    else its first bytes. Reading raises OSError, EOFError, LZMAError, ZstdError or zlib.error for
    a stream that is damaged, unfinished or followed by other bytes.
    """
    file = path.open("rb") if read is None else read.open()
    do_not_keep(file)  # a run reads its input several times
    kind = path.suffix
    if kind != ".gz" and kind not in _DECOMPRESSORS:
        start = file.peek(6)
        kind = next((k for magic, k in _BY_FIRST_BYTES.items() if start.startswith(magic)), "")
    if kind == ".gz":
        # Unlike the others, it refuses what does not begin a stream.
        content = gzip.GzipFile(fileobj=file, mode="rb")
        content.myfileobj = file  # type: ignore[assignment]  # closed with it, as by gzip.open
        return content
    if kind in _DECOMPRESSORS:
        return io.BufferedReader(_Streams(file, _DECOMPRESSORS[kind], padded=kind == ".xz"), _CHUNK)
    return file


class _Streams(io.RawIOBase):
    """The content of all compressed streams of a file, one after the other."""

    def __init__(
        self, file: io.BufferedReader, start: Callable[[], _Decompressor], *, padded: bool
    ) -> None:
        self._file = file
        self._start = start
        self._padded = padded
        self._stream = start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data or self._file.read(_CHUNK)
                if self._padded:
                    data = self._without_padding(data)
                if not data:
                    return 0
                self._stream = self._start()
            elif self._stream.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the file ends within a compressed stream")
            content = self._stream.decompress(data, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _without_padding(self, data: bytes) -> bytes:
        """Return what follows the zeros between streams, which come in fours (xz format, 2.2)."""
        zeros, rest = 0, b""
        while data and not rest:
            rest = data.lstrip(b"\0")
            zeros += len(data) - len(rest)
            data = rest or self._file.read(_CHUNK)
        if zeros % 4:
            raise lzma.LZMAError(f"stream padding of {zeros} bytes, not a multiple of 4")
        return data

    def close(self) -> None:
        self._file.close()
        super().close()
