"""FASTA in: records read, checked against the rules of [input], counted, and cut into windows.

The file is read twice, as a stream: `preflight` checks and counts everything before a model is
loaded, `read_windows` delivers the work. A window is a bounded number of consecutive records;
of identical sequences only the first is computed, and it carries all records that share it.
"""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lib.errors import InputError, LedgerError, MachineError
from lib.sequences.alphabet import LETTERS
from lib.sequences.compression import open_decompressed
from schema.settings import InputSettings

__all__ = [
    "PLAN",
    "Inventory",
    "Owner",
    "Record",
    "Sequence",
    "Window",
    "input_sha256",
    "preflight",
    "read_records",
    "read_windows",
]

WINDOW_RECORDS = 65_536
WINDOW_RESIDUES = 32 * 1024 * 1024
# Part of a run's identity: work that was planned with other bounds cannot be continued.
PLAN = f"windows of {WINDOW_RECORDS} records or {WINDOW_RESIDUES} residues, longest first"

# What `unknown_residues = x` reads as X. Digits and blanks stay errors: they are numbering or a
# broken file, and would add residues that are not there.
_UNKNOWN = bytes(set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ*?") - set(LETTERS))
_BLANKS = " \t\n\v\f"
_BYTE_ORDER_MARK = "\xef\xbb\xbf"  # UTF-8's, as Latin-1
_SHOWN = 80
_CHUNK = 1 << 20
_TO_X = bytes.maketrans(_UNKNOWN, b"X" * len(_UNKNOWN))


class Record(NamedTuple):
    """One FASTA entry after the rules of [input]: `residues` is what is embedded."""

    number: int
    id: str
    description: str
    length: int
    residues: bytes
    mapped: int


class Owner(NamedTuple):
    """A record that a sequence's vectors are written for."""

    number: int
    id: str
    description: str
    length: int


@dataclass
class Sequence:
    """A sequence to compute once, and the records it is written for, in file order."""

    residues: bytes
    owners: list[Owner]


@dataclass(frozen=True)
class Window:
    """Sequences that are planned together; `first_position` is the place of the first in the plan.

    `sequences` are in the order of the plan: longest first, then by record.
    """

    first_position: int
    sequences: list[Sequence]


@dataclass(frozen=True)
class _WindowSummary:
    first_record: int
    stop_record: int
    digest: bytes


@dataclass
class Inventory:
    """What preflight found. `residues` counts what is embedded, identical sequences once."""

    path: Path
    bytes: int
    sha256: str
    records: int = 0
    sequences: int = 0
    residues: int = 0
    longest: int = 0
    truncated: int = 0
    mapped: int = 0
    nucleotide_like: int = 0
    windows: list[_WindowSummary] = field(default_factory=list)
    # (sequences,) embedded residues, in the order of the plan.
    lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    # (records,) the first record with the same embedded residues; itself if there is none.
    same_as: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # Later records of a sequence from an earlier window, by its first record.
    strays: dict[int, list[Owner]] = field(default_factory=dict)


class _Entry(NamedTuple):
    """An entry as it stands in the file, without line breaks and the blanks around lines."""

    header: bytes
    sequence: bytes


def preflight(rules: InputSettings) -> Inventory:
    """Read the whole of [input] fasta, check every record and count.

    Raises InputError naming record, id, position and letter at the first fault.
    """
    path = _input_path(rules)
    before = path.stat()
    inventory = Inventory(path=path, bytes=before.st_size, sha256=input_sha256(rules))
    sequence_digests, id_digests, lengths = bytearray(), bytearray(), array("i")
    window = hashlib.blake2b(digest_size=16)
    first, residues = 0, 0
    for record in read_records(rules):
        size = len(record.residues)
        if record.number > first and (
            record.number - first >= WINDOW_RECORDS or residues + size > WINDOW_RESIDUES
        ):
            inventory.windows.append(_WindowSummary(first, record.number, window.digest()))
            window, first, residues = hashlib.blake2b(digest_size=16), record.number, 0
        residues += size
        window.update(_fingerprint(record))
        sequence_digests += hashlib.blake2b(record.residues, digest_size=16).digest()
        id_digests += hashlib.blake2b(record.id.encode(), digest_size=16).digest()
        lengths.append(size)
        inventory.truncated += size < record.length
        inventory.mapped += record.mapped
        inventory.nucleotide_like += not record.residues.translate(None, b"ACGTUN")
        inventory.longest = max(inventory.longest, record.length)
    inventory.records = len(lengths)
    if not inventory.records:
        raise InputError(f"{path}: no records")
    inventory.windows.append(_WindowSummary(first, inventory.records, window.digest()))
    if rules.duplicate_ids == "error":
        _refuse_repeated_ids(id_digests, rules)
    del id_digests
    inventory.same_as = _first_equal(sequence_digests)
    del sequence_digests
    inventory.lengths = _planned(np.frombuffer(lengths, dtype=np.int32), inventory)
    inventory.sequences = len(inventory.lengths)
    inventory.residues = int(inventory.lengths.sum(dtype=np.int64))
    inventory.strays = _find_strays(inventory, rules)
    after = path.stat()
    # What was digested and what was counted must be the same file.
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was being read")
    return inventory


def read_windows(rules: InputSettings, inventory: Inventory) -> Iterator[Window]:
    """Yield the windows of the plan, each verified to be what preflight saw.

    Raises InputError if the file has changed meanwhile.
    """
    records = read_records(rules)
    position = 0
    for summary in inventory.windows:
        digest = hashlib.blake2b(digest_size=16)
        sequences: dict[int, Sequence] = {}
        for number in range(summary.first_record, summary.stop_record):
            record = next(records, None)
            if record is None:
                break
            digest.update(_fingerprint(record))
            first = int(inventory.same_as[number])
            owner = Owner(record.number, record.id, record.description, record.length)
            if first == number:
                strays = inventory.strays.get(number, [])
                sequences[number] = Sequence(record.residues, [owner, *strays])
            elif first in sequences:
                # Strays come from later windows, so file order wants this one before them.
                behind = len(inventory.strays.get(first, []))
                owners = sequences[first].owners
                owners.insert(len(owners) - behind, owner)
        if digest.digest() != summary.digest:
            raise InputError(f"{inventory.path}: changed while it was being read")
        # sorted() is stable: equal lengths stay in file order.
        yield Window(position, sorted(sequences.values(), key=lambda s: -len(s.residues)))
        position += len(sequences)
    if next(records, None) is not None:
        raise InputError(f"{inventory.path}: changed while it was being read")


def read_records(rules: InputSettings) -> Iterator[Record]:
    """Yield the records of [input] fasta (plain, gzip, bzip2, xz or zstd) after its rules.

    Raises InputError at the first entry that breaks them or is no FASTA.
    """
    path = _input_path(rules)
    place = "before the first record"
    try:
        # Latin-1 keeps every byte as it is: the text layer only cuts lines, at LF, CRLF and CR.
        with io.TextIOWrapper(open_decompressed(path), encoding="latin-1") as lines:
            for number, entry in enumerate(_entries(lines)):
                yield _apply_rules(number, entry, rules)
                place = f"after record {number}"
    except OSError as error:
        if error.errno is not None:
            raise MachineError(f"{path}: {error.strerror}") from None
        # Without a number it is gzip or bzip2 on a broken stream.
        raise InputError(f"{path}: {place}: {error}") from None
    except _NoHeaderError as error:
        raise InputError(f"{path}: {error}") from None
    except (LedgerError, MemoryError):
        raise
    except Exception as error:  # every decompressor has its own: LZMAError, ZstdError, zlib.error
        raise InputError(f"{path}: {place}: {error}") from None


class _NoHeaderError(ValueError):
    """There is text before the first header."""


def _entries(lines: Iterable[str]) -> Iterator[_Entry]:
    """Yield the entries of a FASTA file from its lines, read as Latin-1; `;` starts a comment.

    dnaio would do it, but drops every line that begins with `#`, within a sequence too.
    """
    header: str | None = None
    sequence: list[str] = []
    for number, whole in enumerate(lines, 1):
        line = whole.strip(_BLANKS)
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANKS)
        if line.startswith(">"):
            if header is not None:
                yield _Entry(header.encode("latin-1"), "".join(sequence).encode("latin-1"))
            header, sequence = line[1:], []
        elif line and not line.startswith(";"):
            if header is None:
                raise _NoHeaderError(
                    f"line {number}: expected '>' at the beginning of a record, got "
                    f"{_shown(line.encode('latin-1').decode(errors='replace'))!r}"
                )
            sequence.append(line)
    if header is not None:
        yield _Entry(header.encode("latin-1"), "".join(sequence).encode("latin-1"))


def _input_path(rules: InputSettings) -> Path:
    if rules.fasta is None:
        raise InputError("no input: [input] fasta is empty and no --input was given")
    path = Path(rules.fasta)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    return path


def _apply_rules(number: int, entry: _Entry, rules: InputSettings) -> Record:
    try:
        header = entry.header.decode().split(maxsplit=1)
    except UnicodeDecodeError as error:
        byte = entry.header[error.start]
        raise InputError(f"record {number}: byte 0x{byte:02x} of its header is not UTF-8") from None
    if not header:
        raise InputError(f"record {number}: empty id")
    if b"\0" in entry.header:
        raise InputError(f"record {number} ({_shown(header[0])}): NUL byte in its header")
    name, description = header[0], (header[1] if len(header) > 1 else "")
    residues = entry.sequence.upper().removesuffix(b"*")
    mapped = 0
    if rules.unknown_residues == "x":
        mapped = len(residues) - len(residues.translate(None, _UNKNOWN))
        residues = residues.translate(_TO_X)
    unknown = residues.translate(None, LETTERS)
    if unknown:
        position = residues.index(unknown[:1])
        # All before it is ASCII, so that bytes and letters count alike.
        letter = entry.sequence[position : position + 4].decode(errors="backslashreplace")[0]
        letter = letter.upper() if letter.isascii() else letter
        raise InputError(
            f"record {number} ({_shown(name)}): {letter!r} at residue {position + 1} is not in "
            "the ESM-2 alphabet"
        )
    length = len(residues)
    if not length:
        raise InputError(f"record {number} ({_shown(name)}): empty sequence")
    if length > rules.max_residues:
        if rules.long_sequences == "error":
            raise InputError(
                f"record {number} ({_shown(name)}): {length} residues exceed "
                f"max_residues {rules.max_residues}"
            )
        if rules.long_sequences == "truncate":
            residues = residues[: rules.max_residues]
    return Record(number, name, description, length, residues, mapped)


def _shown(text: str) -> str:
    """Return text of the file as an error shows it: a header may have 10 MB."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _fingerprint(record: Record) -> bytes:
    header = f"{record.id}\0{record.description}\0{record.length}\0".encode(
        "utf-8", "surrogatepass"
    )
    return header + record.residues + b"\0"


def input_sha256(rules: InputSettings) -> str:
    """Return the SHA-256 of the file as it lies on disk, compressed or not."""
    path = _input_path(rules)
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while it was being read")
    return digest


def _first_equal(digests: bytearray) -> npt.NDArray[np.int64]:
    """Return, for each 16-byte digest, the number of the first that equals it."""
    halves = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    # lexsort is stable: in a group of equals, the first in the file comes first.
    order = np.lexsort((halves[:, 0], halves[:, 1]))
    first = np.empty(len(order), dtype=np.int64)
    for start in range(0, len(order), _CHUNK):  # what is made on the way stays small
        part = order[start : start + _CHUNK]
        ordered = halves[order[max(0, start - 1) : start + _CHUNK]]
        begins = (ordered[1:] != ordered[:-1]).any(axis=1)
        if not start:
            begins = np.concatenate([[True], begins])
        # The place of the latest group that begins in this part; -1 in one that began before.
        places = np.maximum.accumulate(np.where(begins, np.arange(len(part)), -1))
        before = first[order[start - 1]] if start else 0
        first[part] = np.where(places < 0, before, part[places])
    return first


def _refuse_repeated_ids(digests: bytearray, rules: InputSettings) -> None:
    # Most often half of each digest tells that no two are equal, in a third of the memory.
    halves = np.sort(np.frombuffer(digests, dtype=np.uint64)[::2])
    if not (halves[1:] == halves[:-1]).any():
        return
    first = _first_equal(digests)
    repeated = np.flatnonzero(first != np.arange(len(first)))
    if not len(repeated):
        return
    second = int(repeated[0])
    for record in read_records(rules):
        if record.number == second:
            raise InputError(
                f"record {second} ({_shown(record.id)}): id repeats record {first[second]}'s"
            )


def _planned(lengths: npt.NDArray[np.int32], inventory: Inventory) -> npt.NDArray[np.int32]:
    """Return what is computed of (records,) lengths, in the order of `read_windows`."""
    own = inventory.same_as == np.arange(len(lengths))
    parts = []
    for window in inventory.windows:
        records = slice(window.first_record, window.stop_record)
        parts.append(-np.sort(-lengths[records][own[records]]))
    return np.concatenate(parts)


def _find_strays(inventory: Inventory, rules: InputSettings) -> dict[int, list[Owner]]:
    if len(inventory.windows) == 1:
        return {}
    starts = np.array([window.first_record for window in inventory.windows])
    window_of = np.searchsorted(starts, np.arange(inventory.records), side="right")
    strayed = window_of[inventory.same_as] != window_of
    strays: dict[int, list[Owner]] = {}
    if strayed.any():
        for record in read_records(rules):
            if strayed[record.number]:
                owner = Owner(record.number, record.id, record.description, record.length)
                strays.setdefault(int(inventory.same_as[record.number]), []).append(owner)
    return strays
