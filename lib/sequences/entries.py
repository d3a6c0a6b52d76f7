"""Entries of a FASTA file: its lines, plain or compressed, as headers and sequences."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lib.errors import InputError, MachineError
from lib.sequences.compression import DigestedRead, open_decompressed
from lib.sequences.inputs import Source

__all__ = ["Entry", "read_entries", "shortened"]

_BLANKS = " \t\n\v\f"
_BYTE_ORDER_MARK = "\xef\xbb\xbf"  # UTF-8's, as Latin-1
_SHOWN_LETTERS = 80


class Entry(NamedTuple):
    """An entry as the file has it, without line breaks and blanks around lines."""

    header: bytes
    sequence: bytes


class _NoHeaderError(ValueError):
    """The file has text before its first header."""


def read_entries(source: Source, read: DigestedRead | None = None) -> Iterator[Entry]:
    """Yield the entries of a FASTA file (plain, gzip, bzip2, xz or zstd).

    read: of this file, if the read is to be digested. Raises InputError if the file is not FASTA
    or its compressed stream is damaged, naming the last record before the damage; MachineError if
    the system cannot read it.
    """
    place = "before the first record"
    try:
        # Latin-1 keeps every byte as it is: the text layer only splits lines, at LF, CRLF and CR.
        with io.TextIOWrapper(open_decompressed(source.path, read), encoding="latin-1") as lines:
            for number, entry in enumerate(_entries(lines)):
                yield entry
                place = f"after record {number}"
    except OSError as error:
        if error.errno is not None:
            raise MachineError(f"{source.name}: {error.strerror}") from None
        # gzip and bzip2 raise an OSError without a number for a damaged stream.
        raise InputError(f"{source.name}: {place}: {error}") from None
    except _NoHeaderError as error:
        raise InputError(f"{source.name}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # every decompressor has its own: LZMAError, ZstdError, zlib.error
        raise InputError(f"{source.name}: {place}: {error}") from None


def shortened(text: str) -> str:
    """Return a text from the file as an error shows it: headers can have 10 MB."""
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}…"


def _entries(lines: Iterable[str]) -> Iterator[Entry]:
    """Yield the entries in lines that were decoded as Latin-1; a line with `;` is a comment.

    dnaio would do this, but it drops every line that begins with `#`, even within a sequence.
    """
    header: str | None = None
    sequence: list[str] = []
    for number, whole in enumerate(lines, 1):
        line = whole.strip(_BLANKS)
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANKS)
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
