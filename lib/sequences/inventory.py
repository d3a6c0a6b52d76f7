"""Inventory: the whole input checked and counted before a model is loaded.

`preflight` reads the file as a stream and remembers, for each record, only its embedded length and
the first record with the same residues. The digest of the input is taken of the bytes of this read;
`lib.sequences.windows` reads the file again for the work and compares it.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.errors import InputError
from lib.sequences.compression import DigestedRead
from lib.sequences.digests import Digests
from lib.sequences.entries import shortened
from lib.sequences.records import (
    Owner,
    Record,
    input_path,
    read_records,
    read_same_records,
    refuse_if_changed,
)
from schema.settings import InputSettings

__all__ = [
    "WINDOW_RECORDS",
    "WINDOW_RESIDUES",
    "Inventory",
    "WindowDigest",
    "WindowSummary",
    "preflight",
]

WINDOW_RECORDS = 65_536
WINDOW_RESIDUES = 32 * 1024 * 1024


@dataclass(frozen=True)
class WindowSummary:
    """The records of a window, and their digest when preflight read them."""

    first_record: int
    stop_record: int
    digest: bytes


@dataclass
class Inventory:
    """The counts of preflight. `residues` counts what is embedded, identical sequences once."""

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
    windows: list[WindowSummary] = field(default_factory=list)
    # (records,) the first record with the same embedded residues, which can be the record itself.
    same_as: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # (records,) embedded residues, in file order.
    record_lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    # (sequences, 2) the digest of each, by its first record; None unless it was asked for.
    digests: npt.NDArray[np.uint64] | None = None
    # Records that repeat a sequence of an earlier window, by the first record that has it.
    strays: dict[int, list[Owner]] = field(default_factory=dict)

    def first_records(self) -> npt.NDArray[np.int64]:
        """Return (sequences,) the first record that has each different sequence, ascending."""
        return np.flatnonzero(self.same_as == np.arange(len(self.same_as)))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(sequences,) embedded residues of the different sequences, as `read_windows` has them."""
        first = self.first_records()
        stops = np.searchsorted(first, [window.stop_record for window in self.windows])
        parts = np.split(self.record_lengths[first], stops[:-1])
        return np.concatenate([-np.sort(-part) for part in parts])


class WindowDigest:
    """A digest of all that the plan takes from the records of a window."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, record: Record) -> None:
        """Take in the next record."""
        header = f"{record.id}\0{record.description}\0{record.length}\0"
        self._hash.update(header.encode("utf-8", "surrogatepass") + record.residues + b"\0")

    def digest(self) -> bytes:
        """Return the digest of the records so far."""
        return self._hash.digest()


class _Windows:
    """Cuts records into windows as they are read."""

    def __init__(self) -> None:
        self._cut: list[WindowSummary] = []
        self._begin(0)

    def add(self, record: Record) -> None:
        """Take in the next record; a window that is full without it ends before it."""
        size = len(record.residues)
        records = record.number - self._first
        if records and (records >= WINDOW_RECORDS or self._residues + size > WINDOW_RESIDUES):
            self._end(record.number)
        self._residues += size
        self._digest.add(record)

    def finish(self, stop: int) -> list[WindowSummary]:
        """Return the windows of all records before `stop`."""
        self._end(stop)
        return self._cut

    def _begin(self, first: int) -> None:
        self._first, self._residues, self._digest = first, 0, WindowDigest()

    def _end(self, stop: int) -> None:
        self._cut.append(WindowSummary(self._first, stop, self._digest.digest()))
        self._begin(stop)


def preflight(rules: InputSettings, *, digests: bool = False) -> Inventory:
    """Read the whole of [input] fasta, check every record and count.

    digests: whether the inventory is to have those of its sequences. Raises InputError naming
    record, id, position and letter at the first fault, or if the file changes meanwhile.
    """
    path = input_path(rules)
    before, read = path.stat(), DigestedRead(path)
    inventory = Inventory(path=path, bytes=0, sha256="")
    sequences, ids, lengths = Digests(), Digests(), array("i")
    windows = _Windows()
    for record in read_records(rules, read):
        windows.add(record)
        sequences.add(record.residues)
        ids.add(record.id.encode())
        lengths.append(len(record.residues))
        _count(record, inventory)
    inventory.bytes, inventory.sha256 = read.bytes_read, read.sha256()
    inventory.records = len(lengths)
    if not inventory.records:
        raise InputError(f"{path}: no records")
    inventory.windows = windows.finish(inventory.records)
    if rules.duplicate_ids == "error":
        _refuse_repeated_ids(ids, rules)
    del ids  # 1.6 GB at a hundred million records, as are the digests of sequences
    inventory.same_as = sequences.first_equal()
    inventory.record_lengths = np.frombuffer(lengths, dtype=np.int32)
    first = inventory.first_records()
    if digests:
        inventory.digests = sequences.of(first)
    del sequences
    inventory.sequences = len(first)
    inventory.residues = int(inventory.record_lengths[first].sum(dtype=np.int64))
    del first
    inventory.strays = _find_strays(inventory, rules)
    # A file that is still being written is refused now, not after the work.
    refuse_if_changed(path, before, path.stat())
    return inventory


def _count(record: Record, inventory: Inventory) -> None:
    inventory.truncated += len(record.residues) < record.length
    inventory.mapped += record.mapped
    inventory.nucleotide_like += not record.residues.translate(None, b"ACGTUN")
    inventory.longest = max(inventory.longest, record.length)


def _refuse_repeated_ids(ids: Digests, rules: InputSettings) -> None:
    if ids.all_differ():
        return
    first = ids.first_equal()
    repeated = np.flatnonzero(first != np.arange(len(first)))
    if not len(repeated):
        return
    second = int(repeated[0])
    for record in read_records(rules):
        if record.number == second:
            raise InputError(
                f"record {second} ({shortened(record.id)}): id repeats record {first[second]}'s"
            )


def _find_strays(inventory: Inventory, rules: InputSettings) -> dict[int, list[Owner]]:
    """Return the records that repeat a sequence of an earlier window, by its first record."""
    if len(inventory.windows) == 1:
        return {}
    starts = np.array([window.first_record for window in inventory.windows])
    window_of = np.searchsorted(starts, np.arange(inventory.records), side="right")
    strayed = window_of[inventory.same_as] != window_of
    strays: dict[int, list[Owner]] = {}
    if strayed.any():
        for record in read_same_records(rules, inventory.sha256):
            if strayed[record.number]:
                first = int(inventory.same_as[record.number])
                strays.setdefault(first, []).append(record.owner)
    return strays
