"""Inputs: the files that [input] fasta names, in the order in which their records count."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError, MachineError
from schema.settings import STANDARD_INPUT, InputSettings

__all__ = [
    "InputFile",
    "Source",
    "combined_sha256",
    "input_sources",
    "named",
    "refuse_if_changed",
    "source_sha256",
]

# Of a folder, the files with these names are read, whatever case they are written in.
_SUFFIXES = (".fasta", ".fa", ".faa", ".fas", ".pep")
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
_ENDINGS = tuple(suffix + kind for suffix in _SUFFIXES for kind in _COMPRESSED)


@dataclass(frozen=True)
class Source:
    """A file to read, and what errors call it; is_copy: whether it holds standard input."""

    path: Path
    name: str
    is_copy: bool = False


@dataclass(frozen=True)
class InputFile:
    """A file of the input, as it was read; first_record: the number of its first record."""

    source: Source
    bytes: int
    sha256: str
    first_record: int
    records: int


def input_sources(rules: InputSettings, standard_input: Path | None = None) -> list[Source]:
    """Return the files of [input] fasta in their order, a folder as its FASTA files by name.

    standard_input: the file in which standard input is kept, if it may be part of the input.
    Raises InputError if there is none, or for what is not a regular file.
    """
    if rules.fasta is None:
        raise InputError("no input: [input] fasta is empty and no --input (make INPUT=) was given")
    if rules.fasta.count(STANDARD_INPUT) > 1:
        raise InputError("standard input (-) stands twice in the input")
    sources = [one for path in rules.fasta for one in _sources(path, standard_input)]
    for source in sources:
        if not stat.S_ISREG(_mode(source)):
            raise InputError(f"{source.name}: not a regular file")
    return sources


def named(names: Sequence[str]) -> str:
    """Return the files of an input in a few words: the first, and how many more there are."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def combined_sha256(digests: Sequence[str]) -> str:
    """Return the digest of an input from its files': the only one, or that of a line of each."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def source_sha256(source: Source) -> str:
    """Return the SHA-256 of a file as stored, compressed or not.

    Raises InputError if the file changes meanwhile, MachineError if it cannot be read.
    """
    try:
        with source.path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise MachineError(f"{source.name}: {error.strerror}") from None
    refuse_if_changed(source, before, after)
    return digest


def refuse_if_changed(source: Source, before: os.stat_result, after: os.stat_result) -> None:
    """Raise InputError unless it is one file, of one size and modification time, before and after.

    Who alters a file can put all of these back: what is computed from it is compared by digest.
    """
    keys = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    if any(getattr(before, key) != getattr(after, key) for key in keys):
        raise InputError(f"{source.name}: changed while it was being read")


def _sources(said: str, standard_input: Path | None) -> Iterator[Source]:
    if said == STANDARD_INPUT:
        if standard_input is None:
            raise InputError("standard input (-) is only read for a new run")
        yield Source(standard_input, "standard input", is_copy=True)
        return
    path = Path(said)
    if not stat.S_ISDIR(_mode(Source(path, said))):
        yield Source(path, said)
        return
    files = _fasta_files(path)
    if not files:
        raise InputError(f"{path}: no FASTA file in this folder ({' '.join(_SUFFIXES)})")
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:  # what no database can hold
            raise InputError(f"{path}: {file.name!a}: not UTF-8") from None
        yield Source(file, str(file))


def _mode(source: Source) -> int:
    try:
        return source.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{source.name}: no such file") from None
    except OSError as error:
        raise MachineError(f"{source.name}: {error.strerror}") from None


def _fasta_files(folder: Path) -> list[Path]:
    try:
        found = [
            path
            for path in folder.iterdir()
            if path.name.lower().endswith(_ENDINGS)
            and not path.name.startswith(".")
            and not path.is_dir()
        ]
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}") from None
    return sorted(found, key=lambda path: path.name)
