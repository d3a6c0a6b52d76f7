"""Records: the entries of the input after the rules of [input], and the file they come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lib.errors import InputError, MachineError
from lib.sequences.alphabet import LETTERS
from lib.sequences.compression import DigestedRead
from lib.sequences.entries import Entry, read_entries, shortened
from schema.settings import InputSettings

__all__ = [
    "Owner",
    "Record",
    "input_path",
    "input_sha256",
    "read_records",
    "read_same_records",
    "refuse_if_changed",
]

# The letters that `unknown_residues = x` reads as X. Digits and blanks stay errors: they come from
# residue numbering or a broken file, and would add residues that the protein does not have.
_UNKNOWN = bytes(set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ*?") - set(LETTERS))
_TO_X = bytes.maketrans(_UNKNOWN, b"X" * len(_UNKNOWN))


class Record(NamedTuple):
    """One FASTA entry after the rules of [input].

    number: position in the file, from 0; length: residues before truncation; residues: the
    letters to embed; mapped: how many of them were unknown and became X; sequence: all letters,
    upper case, as they were before any became X.
    """

    number: int
    id: str
    description: str
    length: int
    residues: bytes
    mapped: int
    sequence: bytes

    @property
    def owner(self) -> Owner:
        """The record without its letters."""
        md5 = hashlib.md5(self.sequence, usedforsecurity=False).hexdigest().upper()
        return Owner(self.number, self.id, self.description, self.length, md5)


class Owner(NamedTuple):
    """A record that gets the vectors of a sequence.

    md5: of all its letters, as UniProt and UniParc write it; records that share what is embedded
    of them can differ in it. The other fields are those of Record.
    """

    number: int
    id: str
    description: str
    length: int
    md5: str


def read_records(rules: InputSettings, read: DigestedRead | None = None) -> Iterator[Record]:
    """Yield the records of [input] fasta in file order.

    read: of that file, if the read is to be digested. Raises InputError at the first entry that
    breaks the rules, and what `read_entries` raises.
    """
    for number, entry in enumerate(read_entries(input_path(rules), read)):
        yield _apply_rules(number, entry, rules)


def read_same_records(rules: InputSettings, sha256: str) -> Iterator[Record]:
    """Yield the records of [input] fasta; raises InputError if its bytes have another digest.

    The digest is known, and compared, after the last record.
    """
    read = DigestedRead(input_path(rules))
    yield from read_records(rules, read)
    if read.sha256() != sha256:
        raise InputError(f"{read.path}: changed while it was being read")


def input_path(rules: InputSettings) -> Path:
    """Return the path of [input] fasta; raises InputError unless it is a regular file."""
    if rules.fasta is None:
        raise InputError("no input: [input] fasta is empty and no --input was given")
    path = Path(rules.fasta)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    return path


def input_sha256(rules: InputSettings) -> str:
    """Return the SHA-256 of [input] fasta as stored, compressed or not.

    Raises InputError if the file changes meanwhile, MachineError if it cannot be read.
    """
    path = input_path(rules)
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    refuse_if_changed(path, before, after)
    return digest


def refuse_if_changed(path: Path, before: os.stat_result, after: os.stat_result) -> None:
    """Raise InputError unless it is one file, of one size and modification time, before and after.

    Who alters a file can put all of these back: what is computed from it is compared by digest.
    """
    keys = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    if any(getattr(before, key) != getattr(after, key) for key in keys):
        raise InputError(f"{path}: changed while it was being read")


def _apply_rules(number: int, entry: Entry, rules: InputSettings) -> Record:
    name, description = _id_and_description(number, entry.header)
    sequence = residues = entry.sequence.upper().removesuffix(b"*")
    mapped = 0
    if rules.unknown_residues == "x":
        mapped = len(residues) - len(residues.translate(None, _UNKNOWN))
        residues = residues.translate(_TO_X)
    unknown = residues.translate(None, LETTERS)
    if unknown:
        position = residues.index(unknown[:1])
        # Everything before it is ASCII, so bytes and letters have the same positions.
        letter = entry.sequence[position : position + 4].decode(errors="backslashreplace")[0]
        letter = letter.upper() if letter.isascii() else letter
        raise InputError(
            f"record {number} ({shortened(name)}): {letter!r} at residue {position + 1} is not in "
            "the ESM-2 alphabet"
        )
    length = len(residues)
    if not length:
        raise InputError(f"record {number} ({shortened(name)}): empty sequence")
    if length > rules.max_residues:
        if rules.long_sequences == "error":
            raise InputError(
                f"record {number} ({shortened(name)}): {length} residues exceed "
                f"max_residues {rules.max_residues}"
            )
        if rules.long_sequences == "truncate":
            residues = residues[: rules.max_residues]
    return Record(number, name, description, length, residues, mapped, sequence)


def _id_and_description(number: int, header: bytes) -> tuple[str, str]:
    """Return the first word of a header, and the rest."""
    try:
        words = header.decode().split(maxsplit=1)
    except UnicodeDecodeError as error:
        byte = header[error.start]
        raise InputError(f"record {number}: byte 0x{byte:02x} of its header is not UTF-8") from None
    if not words:
        raise InputError(f"record {number}: empty id")
    if b"\0" in header:
        raise InputError(f"record {number} ({shortened(words[0])}): NUL byte in its header")
    return words[0], (words[1] if len(words) > 1 else "")
