"""Entries of a FASTA file: its text, plain or compressed, in blocks of whole entries.

No parser that is compiled and kept well reads all that docs/input.md promises. dnaio drops lines
that begin with `#` within a sequence; pysam and pyfastx end a sequence at a NUL byte and take FASTQ
for FASTA, as needletail does, which writes U+FFFD for bytes that are not UTF-8. Comments with `;`,
CR, byte order marks and blanks around lines are read by some of them only. So text is cut into
blocks, which `lib.sequences.records` splits as a whole where they are plain; others are read here,
line by line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from gzip import GzipFile
from io import BufferedReader
from typing import NamedTuple

from lib.errors import InputError, LedgerError, MachineError
from lib.sequences.compression import DigestedRead, open_decompressed
from lib.sequences.inputs import Source

__all__ = ["BLANKS", "Block", "Entry", "read_blocks", "read_errors", "shortened"]

BLANKS = " \t\v\f"
_BYTE_ORDER_MARK = re.compile(rb"[ \t\v\f]*\xef\xbb\xbf")  # UTF-8's
_SHOWN_LETTERS = 80
_PIECE = 1 << 16
_HEADER = re.compile(rb"^[ \t\v\f]*>", re.MULTILINE)


class Entry(NamedTuple):
    """An entry as the file has it, without line breaks and blanks around lines."""

    header: bytes
    sequence: bytes


class Block(NamedTuple):
    """Text of a file that begins with an entry, or before the first, and ends before another.

    Its lines end with LF; first_line: the number of its first line, from 1.
    """

    text: bytes
    first_line: int

    def entries(self) -> Iterator[Entry]:
        """Yield the entries, read line by line. A line with `;` is a comment."""
        # Latin-1 keeps every byte as it is.
        return _entries(self.text.decode("latin-1").split("\n"), self.first_line)


class _NoHeaderError(ValueError):
    """The file has text before its first header."""


def read_blocks(source: Source, read: DigestedRead | None = None) -> Iterator[Block]:
    """Yield the text of a FASTA file (plain, gzip, bzip2, xz or zstd) in blocks.

    read: of this file, if the read is to be digested. `read_errors` turns what this raises, and
    what reading a block raises, into errors with one line.
    """
    held: list[bytes] = []  # of the last entry so far
    line = 1
    with open_decompressed(source.path, read) as file:
        for lines in _whole_lines(file):
            if line == 1 and not held:
                mark = _BYTE_ORDER_MARK.match(lines)
                lines = lines[mark.end() :] if mark else lines
            cut = _last_header(lines)
            if held and cut is None:
                held.append(lines)
                continue
            # Before the first header there is nothing to wait for.
            text = b"".join([*held, lines[:cut]])
            if text:
                yield Block(text, line)
                line += text.count(b"\n")
            held = [] if cut is None else [lines[cut:]]
    if held:
        yield Block(b"".join(held), line)


@contextmanager
def read_errors(source: Source, records: Callable[[], int]) -> Iterator[None]:
    """Turn what reading a file raises into an InputError, or a MachineError if the system failed.

    records: how many have been read; an error of a damaged stream names the last.
    """
    try:
        yield
    except (LedgerError, MemoryError):
        raise
    except _NoHeaderError as error:
        raise InputError(f"{source.name}: {error}") from None
    except Exception as error:  # every decompressor has its own: LZMAError, ZstdError, zlib.error
        # gzip and bzip2 raise an OSError without a number for a damaged stream.
        if isinstance(error, OSError) and error.errno is not None:
            raise MachineError(f"{source.name}: {error.strerror}") from None
        place = f"after record {records() - 1}" if records() else "before the first record"
        raise InputError(f"{source.name}: {place}: {error}") from None


def shortened(text: str) -> str:
    """Return a text from the file as an error shows it: headers can have 10 MB."""
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}…"


def _whole_lines(file: GzipFile | BufferedReader) -> Iterator[bytes]:
    """Yield the content in pieces that end with a line; the lines end with LF, CRLF or CR."""
    begun: list[bytes] = []
    carriage_return = b""  # at the end of a piece: the next may begin with its LF
    # read1 gives what comes before damage in a stream.
    while piece := file.read1(_PIECE):
        text = carriage_return + piece
        carriage_return = b"\r" if text.endswith(b"\r") else b""
        if b"\r" in text:
            text = text.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = text.rfind(b"\n") + 1
        if cut:
            yield b"".join([*begun, text[:cut]])
            begun.clear()
        begun.append(text[cut:])
    rest = b"".join(begun)
    if rest:
        yield rest


def _last_header(lines: bytes) -> int | None:
    """Return where the line of the last header begins; None if there is none."""
    near = lines.rfind(b"\n>") + 1  # blanks may stand before the `>` of a later one
    return max((header.start() for header in _HEADER.finditer(lines, near)), default=None)


def _entries(lines: Iterable[str], first_line: int) -> Iterator[Entry]:
    """Yield the entries in lines that were decoded as Latin-1."""
    header: str | None = None
    sequence: list[str] = []
    for number, whole in enumerate(lines, first_line):
        line = whole.strip(BLANKS)
        if line.startswith(">"):
            if header is not None:
                yield _entry(header, sequence)
            header, sequence = line[1:], []
        elif line and not line.startswith(";"):
            if header is None:
                raise _NoHeaderError(
                    f"line {number}: expected '>' at the beginning of a record, got "
                    f"{shortened(line.encode('latin-1').decode(errors='replace'))!r}"
                )
            sequence.append(line)
    if header is not None:
        yield _entry(header, sequence)


def _entry(header: str, lines: list[str]) -> Entry:
    return Entry(header.encode("latin-1"), "".join(lines).encode("latin-1"))
