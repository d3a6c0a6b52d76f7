"""FASTA in: records read, checked against the rules of [input], counted, and cut into windows.

The file is read twice, as a stream: `preflight` checks and counts everything before a model is
loaded, `read_windows` delivers the work. A window is a bounded number of consecutive records;
of identical sequences only the first is computed, and it carries all records that share it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import dnaio
import numpy as np
import numpy.typing as npt
from xopen import xopen

from lib.alphabet import LETTERS
from lib.errors import InputError, LedgerError, MachineError
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
    # (records,) the first record with the same embedded residues; itself if there is none.
    same_as: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # Later records of a sequence from an earlier window, by its first record.
    strays: dict[int, list[Owner]] = field(default_factory=dict)


class _Entry(NamedTuple):
    """What dnaio makes of an entry; its own class refuses non-ASCII headers."""

    name: str
    sequence: str
    qualities: None


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
        _refuse_repeated_ids(_first_equal(id_digests), rules)
    inventory.same_as = _first_equal(sequence_digests)
    own = inventory.same_as == np.arange(inventory.records)
    inventory.sequences = int(own.sum())
    inventory.residues = int(np.frombuffer(lengths, dtype=np.intc)[own].sum(dtype=np.int64))
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
    number = 0
    try:
        opener = functools.partial(xopen, threads=0)
        with dnaio.FastaReader(str(path), sequence_class=_Entry, opener=opener) as entries:
            for number, entry in enumerate(entries):
                yield _apply_rules(number, entry, rules)
    except dnaio.FileFormatError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path}: after record {number}: byte 0x{byte:02x} is not UTF-8") from None
    except OSError as error:
        if error.errno is not None:
            raise MachineError(f"{path}: {error.strerror}") from None
        # Without a number it is gzip or bzip2 on a broken stream.
        raise InputError(f"{path}: after record {number}: {error}") from None
    except (LedgerError, MemoryError):
        raise
    except Exception as error:  # every decompressor has its own: LZMAError, IsalError, ZstdError
        raise InputError(f"{path}: after record {number}: {error}") from None


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
    header = entry.name.split(maxsplit=1)
    if not header:
        raise InputError(f"record {number}: empty id")
    name, description = header[0], (header[1] if len(header) > 1 else "")
    try:
        residues = entry.sequence.encode("ascii").upper().removesuffix(b"*")
    except UnicodeEncodeError as error:
        letter = entry.sequence[error.start]
        raise InputError(_letter_fact(number, name, error.start, letter)) from None
    mapped = 0
    if rules.unknown_residues == "x":
        mapped = len(residues) - len(residues.translate(None, _UNKNOWN))
        residues = residues.translate(_TO_X)
    unknown = residues.translate(None, LETTERS)
    if unknown:
        position = residues.index(unknown[:1])
        raise InputError(_letter_fact(number, name, position, chr(unknown[0])))
    length = len(residues)
    if not length:
        raise InputError(f"record {number} ({name}): empty sequence")
    if length > rules.max_residues:
        if rules.long_sequences == "error":
            raise InputError(
                f"record {number} ({name}): {length} residues exceed max_residues "
                f"{rules.max_residues}"
            )
        if rules.long_sequences == "truncate":
            residues = residues[: rules.max_residues]
    return Record(number, name, description, length, residues, mapped)


def _letter_fact(number: int, name: str, position: int, letter: str) -> str:
    return (
        f"record {number} ({name}): {letter!r} at residue {position + 1} is not in the ESM-2 "
        f"alphabet"
    )


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
    ordered = halves[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.cumsum(starts) - 1
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[starts][group]
    return first


def _refuse_repeated_ids(first: npt.NDArray[np.int64], rules: InputSettings) -> None:
    repeated = np.flatnonzero(first != np.arange(len(first)))
    if not len(repeated):
        return
    second = int(repeated[0])
    for record in read_records(rules):
        if record.number == second:
            raise InputError(f"record {second} ({record.id}): id repeats record {first[second]}'s")


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
