"""Records: the entries of the input after the rules of [input]."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, repeat
from typing import NamedTuple

from lib.errors import InputError
from lib.sequences.alphabet import LETTERS
from lib.sequences.compression import DigestedRead
from lib.sequences.entries import BLANKS, Block, Entry, read_blocks, read_errors, shortened
from lib.sequences.inputs import InputFile, Source
from schema.settings import InputSettings

__all__ = [
    "Owner",
    "Record",
    "read_file",
    "read_same_records",
]

# The letters that `unknown_residues = x` reads as X. Digits and blanks stay errors: they come from
# residue numbering or a broken file, and would add residues that the protein does not have.
_UNKNOWN = bytes(set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ*?") - set(LETTERS))
_PLAIN = LETTERS + b">"
_TO_X = bytes.maketrans(_UNKNOWN, b"X" * len(_UNKNOWN))


class Record(NamedTuple):
    """One FASTA entry after the rules of [input].

    number: position in the input, from 0; length: residues before truncation; residues: the
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


def read_file(
    source: Source,
    rules: InputSettings,
    first: int,
    read: DigestedRead | None = None,
    *,
    several: bool,
) -> Iterator[list[Record]]:
    """Yield the records of one file, one or many at a time.

    first: the number of its first record; read: of this file, if the read is to be digested;
    several: whether errors must name the file. They then count its records from 0. Raises
    InputError at the first entry that breaks the rules, that is not FASTA or whose compressed
    stream is damaged; MachineError if the system cannot read the file.
    """
    done = 0
    with read_errors(source, lambda: done):
        for block in read_blocks(source, read):
            records = _plain_records(block, first + done, rules)
            if records is None:
                try:
                    records = _checked_records(block, done, rules)
                except InputError as error:
                    if not several:
                        raise
                    raise InputError(f"{source.name}: {error}") from None
                if first:
                    records = [one._replace(number=first + one.number) for one in records]
            if records:
                done += len(records)
                yield records


def read_same_records(rules: InputSettings, files: Sequence[InputFile]) -> Iterator[Record]:
    """Yield the records of files that were read before.

    Raises InputError, after the last record of a file, if its bytes have another digest.
    """
    for file in files:
        read = DigestedRead(file.source.path)
        for records in read_file(
            file.source, rules, file.first_record, read, several=len(files) > 1
        ):
            yield from records
        if read.sha256() != file.sha256:
            raise InputError(f"{file.source.name}: changed while it was being read")


def _plain_records(block: Block, first: int, rules: InputSettings) -> list[Record] | None:
    """Return the records of a block, split as a whole.

    Returns None if it has anything but headers and known letters, which `_checked_records` reads
    line by line: comments, blanks, other letters, faults. first: the number of the first record.
    """
    if not block.text.startswith(b">"):
        return None
    entries = [entry.partition(b"\n") for entry in block.text[1:].split(b"\n>")]
    letters = b">".join([lines for _, _, lines in entries]).translate(None, b"\n")
    if letters.translate(None, _PLAIN):
        letters = (letters.upper() + b">").replace(b"*>", b">")[:-1]
        if letters.translate(None, _PLAIN):
            return None
    sequences = letters.split(b">")
    if len(sequences) != len(entries) or b"" in sequences:
        return None
    headers = b"\n".join([header for header, _, _ in entries])
    words = _words(headers)
    lengths = [*map(len, sequences)]
    residues = sequences
    if words is None:
        return None
    if max(lengths) > rules.max_residues:
        if rules.long_sequences == "error":
            return None
        if rules.long_sequences == "truncate":
            residues = [sequence[: rules.max_residues] for sequence in sequences]
    ids = [one[0] for one in words]
    descriptions = [one[1] if len(one) > 1 else "" for one in words]
    return [*map(Record, count(first), ids, descriptions, lengths, residues, repeat(0), sequences)]


def _words(headers: bytes) -> list[list[str]] | None:
    """Return the first word and the rest of each header, one a line; None if one has a fault."""
    try:
        text = headers.decode()
    except UnicodeDecodeError:
        return None
    words = [header.rstrip(BLANKS).split(maxsplit=1) for header in text.split("\n")]
    return None if "\0" in text or [] in words else words


def _checked_records(block: Block, first: int, rules: InputSettings) -> list[Record]:
    """Return the records of a block; raises InputError at the first that breaks the rules."""
    return [_apply_rules(number, one, rules) for number, one in enumerate(block.entries(), first)]


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
        setting = " (input.unknown_residues)" if unknown[0] in _UNKNOWN else ""
        raise InputError(
            f"record {number} ({shortened(name)}): {letter!r} at residue {position + 1} is not in "
            f"the ESM-2 alphabet{setting}"
        )
    length = len(residues)
    if not length:
        raise InputError(f"record {number} ({shortened(name)}): empty sequence")
    if length > rules.max_residues:
        if rules.long_sequences == "error":
            raise InputError(
                f"record {number} ({shortened(name)}): {length} residues exceed "
                f"max_residues {rules.max_residues} (input.long_sequences)"
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
