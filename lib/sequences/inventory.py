"""Inventory: the whole input checked and counted before a model is loaded.

`preflight` reads the files as a stream and remembers, for each record, only its embedded length and
the first record with the same residues. The digest of a file is taken of the bytes of this read;
`lib.sequences.windows` reads the files again for the work and compares them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import lt
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.errors import InputError
from lib.sequences.compression import DigestedRead
from lib.sequences.digests import Digests, Index
from lib.sequences.entries import shortened
from lib.sequences.inputs import (
    InputFile,
    combined_sha256,
    input_sources,
    named,
    refuse_if_changed,
)
from lib.sequences.records import Owner, Record, read_file, read_same_records
from lib.units import records
from schema.settings import InputSettings

__all__ = [
    "WINDOW_RECORDS",
    "WINDOW_RESIDUES",
    "Inventory",
    "WindowDigest",
    "WindowSummary",
    "preflight",
]

# ESM-2 knows all of these letters, so that genes and rows of an alignment pass for proteins.
_NUCLEOTIDES = b"ACGTUN"
_GAPS = b"-."

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
    """The counts of preflight. `residues` counts what is embedded, identical sequences once.

    nucleotide_like: records of nothing but ACGTUN and gaps; with_gaps: records with - or `.`.
    header_letters: of all ids and descriptions.
    """

    files: list[InputFile]
    records: int = 0
    sequences: int = 0
    residues: int = 0
    longest: int = 0
    truncated: int = 0
    mapped: int = 0
    nucleotide_like: int = 0
    with_gaps: int = 0
    header_letters: int = 0
    windows: list[WindowSummary] = field(default_factory=list)
    # (records,) the first record with the same embedded residues, which can be the record itself.
    same_as: Index = field(default_factory=lambda: np.empty(0, np.int32))
    # (records,) embedded residues, in file order.
    record_lengths: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    # (sequences, 2) the digest of each, by its first record; None unless it was asked for.
    digests: npt.NDArray[np.uint64] | None = None
    # Records that repeat a sequence of an earlier window, by the first record that has it.
    strays: dict[int, list[Owner]] = field(default_factory=dict)

    def changes(self, max_residues: int) -> Iterator[str]:
        """Yield lines on sequences that were changed, and on those that do not look like proteins.

        max_residues: the length to which longer sequences were truncated.
        """
        if self.truncated:
            yield f"truncated to {max_residues} residues: {records(self.truncated)}"
        if self.mapped:
            yield f"unknown letters read as X: {self.mapped}"
        if self.nucleotide_like:
            yield f"only letters of ACGTUN (nucleotides?): {records(self.nucleotide_like)}"
        if self.with_gaps:
            yield f"gaps, - or . (an alignment?): {records(self.with_gaps)}"

    def first_records(self) -> npt.NDArray[np.int64]:
        """Return (sequences,) the first record that has each different sequence, ascending."""
        return np.flatnonzero(
            self.same_as == np.arange(len(self.same_as), dtype=self.same_as.dtype)
        )

    def file_of(self, record: int) -> InputFile:
        """Return the file of a record."""
        return next(one for one in reversed(self.files) if one.first_record <= record)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(sequences,) embedded residues of the different sequences, as `read_windows` has them."""
        first = self.first_records()
        stops = np.searchsorted(first, [window.stop_record for window in self.windows])
        parts = np.split(self.record_lengths[first], stops[:-1])
        return np.concatenate([-np.sort(-part) for part in parts])

    @property
    def name(self) -> str:
        """The files of the input in a few words."""
        return named([file.source.name for file in self.files])

    @property
    def bytes(self) -> int:
        """The size of the files as stored."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the only file, or of the list of those of several."""
        return combined_sha256([file.sha256 for file in self.files])


class WindowDigest:
    """A digest of all that the plan takes from the records of a window.

    It does not depend on how many records come at once.
    """

    def __init__(self) -> None:
        self._hashes = [hashlib.blake2b(digest_size=16) for _ in range(4)]

    def add(self, records: Sequence[Record]) -> None:
        """Take in the next records."""
        columns = (
            "".join([f"{record.id}\0" for record in records]).encode(),
            "".join([f"{record.description}\0" for record in records]).encode(),
            np.array([record.length for record in records], np.int64).tobytes(),
            # What is embedded comes of these letters, and the MD5 is of them all.
            b"".join([record.sequence + b"\0" for record in records]),
        )
        for column, content in zip(self._hashes, columns, strict=True):
            column.update(content)

    def digest(self) -> bytes:
        """Return the digest of the records so far."""
        return b"".join(one.digest() for one in self._hashes)


class _Windows:
    """Cuts records into windows as they are read."""

    def __init__(self) -> None:
        self._cut: list[WindowSummary] = []
        self._begin(0)

    def add(self, records: list[Record]) -> None:
        """Take in the next records; a window that is full without one ends before it."""
        residues = sum([len(record.residues) for record in records])
        if self._has_room(records[-1].number - self._first, residues):
            self._residues += residues
            self._digest.add(records)
            return
        start = 0
        for place, record in enumerate(records):
            size = len(record.residues)
            held = record.number - self._first
            if held and not self._has_room(held, size):
                self._digest.add(records[start:place])
                self._end(record.number)
                start = place
            self._residues += size
        self._digest.add(records[start:])

    def _has_room(self, held: int, residues: int) -> bool:
        return held < WINDOW_RECORDS and self._residues + residues <= WINDOW_RESIDUES

    def finish(self, stop: int) -> list[WindowSummary]:
        """Return the windows of all records before `stop`."""
        self._end(stop)
        return self._cut

    def _begin(self, first: int) -> None:
        self._first, self._residues, self._digest = first, 0, WindowDigest()

    def _end(self, stop: int) -> None:
        self._cut.append(WindowSummary(self._first, stop, self._digest.digest()))
        self._begin(stop)


def preflight(
    rules: InputSettings, standard_input: Path | None = None, *, digests: bool = False
) -> Inventory:
    """Read the whole of [input] fasta, check every record and count.

    standard_input: the file in which standard input is kept; digests: whether the inventory is to
    have those of its sequences. Raises InputError naming record, id, position and letter at the
    first fault, or if a file changes meanwhile.
    """
    sources = input_sources(rules, standard_input)
    before = [source.path.stat() for source in sources]
    inventory = Inventory(files=[])
    # Of ids 64 bits are enough: those that seem to repeat are compared.
    sequences, ids, lengths = Digests(), array("q"), array("i")
    windows = _Windows()
    for source in sources:
        read, first = DigestedRead(source.path), len(lengths)
        for batch in read_file(source, rules, first, read, several=len(sources) > 1):
            windows.add(batch)
            residues = [record.residues for record in batch]
            sequences.extend(residues)
            ids.extend([hash(record.id) for record in batch])
            lengths.extend(map(len, residues))
            _count(batch, residues, inventory)
        records = len(lengths) - first
        if not records:
            raise InputError(f"{source.name}: no records")
        inventory.files.append(InputFile(source, read.bytes_read, read.sha256(), first, records))
    inventory.records = len(lengths)
    inventory.windows = windows.finish(inventory.records)
    if rules.duplicate_ids == "error":
        _refuse_repeated_ids(np.frombuffer(ids, np.int64), inventory, rules)
    del ids  # 800 MB at a hundred million records; the digests of sequences are twice that
    inventory.same_as = sequences.first_equal()
    inventory.record_lengths = np.frombuffer(lengths, dtype=np.int32)
    own = inventory.first_records()
    if digests:
        inventory.digests = sequences.of(own)
    del sequences
    inventory.sequences = len(own)
    inventory.residues = int(inventory.record_lengths[own].sum(dtype=np.int64))
    del own
    inventory.strays = _find_strays(inventory, rules)
    # A file that is still being written is refused now, not after the work.
    for source, stat in zip(sources, before, strict=True):
        refuse_if_changed(source, stat, source.path.stat())
    return inventory


def _count(records: list[Record], residues: list[bytes], inventory: Inventory) -> None:
    lengths = [record.length for record in records]
    inventory.truncated += sum(map(lt, map(len, residues), lengths))
    inventory.header_letters += sum([len(one.id) + len(one.description) for one in records])
    inventory.mapped += sum([record.mapped for record in records])
    inventory.nucleotide_like += [one.lstrip(_NUCLEOTIDES) for one in residues].count(b"")
    together = b"".join(residues)
    if b"-" in together or b"." in together:
        _count_gaps(residues, inventory)
    inventory.longest = max(inventory.longest, *lengths)


def _count_gaps(residues: list[bytes], inventory: Inventory) -> None:
    """Count sequences with gaps, and those of them that have nucleotides and nothing else."""
    for one in residues:
        letters = one.translate(None, _GAPS)
        if len(letters) < len(one):
            inventory.with_gaps += 1
            inventory.nucleotide_like += bool(letters) and not letters.lstrip(_NUCLEOTIDES)


def _refuse_repeated_ids(
    hashes: npt.NDArray[np.int64], inventory: Inventory, rules: InputSettings
) -> None:
    """Raise InputError at the first record with an earlier one's id; hashes: (records,) of ids."""
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return
    suspected = np.isin(hashes, twice)
    seen: dict[str, int] = {}
    for record in read_same_records(rules, inventory.files):
        if suspected[record.number] and seen.setdefault(record.id, record.number) != record.number:
            raise InputError(_repeats(record, seen[record.id], inventory))


def _repeats(record: Record, earlier: int, inventory: Inventory) -> str:
    """Return the error of a record with an earlier one's id; of several files, both are named."""
    name = shortened(record.id)
    if len(inventory.files) == 1:
        return (
            f"record {record.number} ({name}): id repeats record {earlier}'s (input.duplicate_ids)"
        )
    file, other = inventory.file_of(record.number), inventory.file_of(earlier)
    return (
        f"{file.source.name}: record {record.number - file.first_record} ({name}): id repeats "
        f"that of record {earlier - other.first_record} in {other.source.name} "
        "(input.duplicate_ids)"
    )


def _find_strays(inventory: Inventory, rules: InputSettings) -> dict[int, list[Owner]]:
    """Return the records that repeat a sequence of an earlier window, by its first record."""
    if len(inventory.windows) == 1:
        return {}
    strayed = np.empty(inventory.records, bool)
    for window in inventory.windows:
        records = slice(window.first_record, window.stop_record)
        strayed[records] = inventory.same_as[records] < window.first_record
    strays: dict[int, list[Owner]] = {}
    if strayed.any():
        for record in read_same_records(rules, inventory.files):
            if strayed[record.number]:
                first = int(inventory.same_as[record.number])
                strays.setdefault(first, []).append(record.owner)
    return strays
