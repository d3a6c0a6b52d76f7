"""Compressed files, read to the last byte: gzip, bzip2, xz and zstd, told by name or first bytes.

bz2.open, lzma.open and zstd.open take whatever follows the first stream and is no stream for
the end of the file. In a file of several streams (pbzip2 and pixz write them) one damaged byte
then loses the rest of the records in silence; here it is an error.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from backports import zstd

__all__ = ["open_decompressed"]

_CHUNK = 1 << 17
# Of any honest file; a header may ask for 4 GiB before the first byte comes out.
_LARGEST_DICTIONARY = 1 << 28
_BY_FIRST_BYTES = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}


class _Decompressor(Protocol):
    """What bz2, lzma and zstd have in common: one stream."""

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


def open_decompressed(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a file, plain or compressed, for reading what it says.

    The name decides, then the first bytes. Reading raises OSError or EOFError, or LZMAError,
    ZstdError or zlib.error, for a stream that is damaged, unfinished or followed by other bytes.
    """
    kind = path.suffix
    if kind != ".gz" and kind not in _DECOMPRESSORS:
        with path.open("rb") as file:
            start = file.read(6)
        kind = next((k for magic, k in _BY_FIRST_BYTES.items() if start.startswith(magic)), "")
    if kind == ".gz":
        return gzip.open(path, "rb")  # strict about what follows a member, unlike the others
    file = path.open("rb")
    if kind in _DECOMPRESSORS:
        return io.BufferedReader(_Streams(file, _DECOMPRESSORS[kind]), _CHUNK)
    return file


class _Streams(io.RawIOBase):
    """The content of compressed streams, one after the other, up to the end of the file."""

    def __init__(self, file: io.BufferedReader, start: Callable[[], _Decompressor]) -> None:
        self._file = file
        self._start = start
        self._stream = start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data or self._file.read(_CHUNK)
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

    def close(self) -> None:
        self._file.close()
        super().close()
