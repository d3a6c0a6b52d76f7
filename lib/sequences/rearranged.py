"""Rearranged records: reused ones in the order of the plan, by way of a temporary file.

The plan has them in the order of what they are copied from, which can be any order of the input.
Memory holds a window of the input, then one range of the plan. The file has no name: it is gone
when it is closed, however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from lib.files import disk_errors
from lib.sequences.describing import describe_owners, owner_index
from lib.sequences.inventory import Inventory
from lib.sequences.records import Owner
from lib.sequences.reused import Reused
from lib.sequences.windows import Sequence as FastaSequence
from lib.sequences.windows import Window, read_windows
from schema.parquet import DESCRIBING, SEQUENCE_MD5
from schema.settings import InputSettings

__all__ = ["rearranged_records", "rearranged_windows"]

# A row per record that has a reused sequence.
_COLUMNS = DESCRIBING.insert(0, pa.field("position", pa.int64()))
_RESIDUES = pa.field("residues", pa.binary())  # only in the first row of a position


def rearranged_records(
    rules: InputSettings,
    inventory: Inventory,
    reused: Reused,
    ranges: Sequence[range],
    folder: Path,
    *,
    residues: bool = False,
) -> Iterator[tuple[range, pa.Table]]:
    """Yield each range of the plan with its records, by position and then in file order.

    ranges: of positions of reused sequences, ascending and disjoint. folder: where the temporary
    file lies. A table has the columns of a checkpoint file that are not vectors and `position`;
    residues: whether it has what is embedded, too. Raises what `read_windows` raises, and
    MachineError if the disk fails.
    """
    if not ranges:
        return
    columns = _COLUMNS.append(_RESIDUES) if residues else _COLUMNS
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        # For each range, the place and the size in the file of every part of it.
        parts = [array("q") for _ in ranges]
        for window in read_windows(rules, inventory):
            _scatter(_rows(window, reused, ranges, columns), ranges, file, parts)
        for positions, places in zip(ranges, parts, strict=True):
            yield positions, _gather(places, file, columns)


def rearranged_windows(
    rules: InputSettings,
    inventory: Inventory,
    reused: Reused,
    ranges: Sequence[range],
    folder: Path,
) -> Iterator[Window]:
    """Yield each range of the plan as a window, as if it were to be computed.

    Takes and raises what `rearranged_records` does.
    """
    tables = rearranged_records(rules, inventory, reused, ranges, folder, residues=True)
    for positions, table in tables:
        sequences: list[FastaSequence] = []
        fields = ("residues", "record", "id", "description", "length", SEQUENCE_MD5)
        for letters, *owner in zip(*(table.column(one).to_pylist() for one in fields), strict=True):
            if letters is not None:
                sequences.append(FastaSequence(letters, []))
            sequences[-1].owners.append(Owner(*owner))
        yield Window(positions.start, sequences)


def _rows(
    window: Window, reused: Reused, ranges: Sequence[range], columns: pa.Schema
) -> pa.RecordBatch:
    """Return the records of a window whose sequences are in the ranges, by position."""
    stops = np.array([one.stop for one in ranges])
    firsts = np.array([sequence.owners[0].number for sequence in window.sequences], np.int64)
    places = reused.places[firsts]
    after = np.searchsorted(stops, places, side="right")
    starts = np.array([*(one.start for one in ranges), np.iinfo(np.int64).max])
    chosen = np.flatnonzero((places >= 0) & (places >= starts[after]))
    chosen = chosen[np.argsort(places[chosen])]
    sequences = [window.sequences[i] for i in chosen.tolist()]
    owners = describe_owners(sequences)
    arrays = [pa.array(places[chosen][owner_index(sequences)]), *owners.columns]
    if _RESIDUES.name in columns.names:
        letters = [
            sequence.residues if owner is sequence.owners[0] else None
            for sequence in sequences
            for owner in sequence.owners
        ]
        arrays.append(pa.array(letters, pa.binary()))
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def _scatter(
    rows: pa.RecordBatch, ranges: Sequence[range], file: IO[bytes], parts: Sequence[array[int]]
) -> None:
    """Write what each range has of some rows, which are by position."""
    positions = rows.column("position").to_numpy()
    starts = np.searchsorted(positions, [one.start for one in ranges]).tolist()
    ends = [*starts[1:], len(positions)]
    for start, stop, places in zip(starts, ends, parts, strict=True):
        if stop > start:
            written = rows.slice(start, stop - start).serialize()
            places.extend((file.tell(), written.size))
            file.write(written)


def _gather(places: array[int], file: IO[bytes], columns: pa.Schema) -> pa.Table:
    """Read the parts of a range; return its rows by position, and in file order where it is one."""
    file.flush()
    batches = []
    for offset, size in zip(places[::2], places[1::2], strict=True):
        part = pa.py_buffer(os.pread(file.fileno(), size, offset))
        batches.append(pa.ipc.read_record_batch(part, columns))
    table = pa.Table.from_batches(batches, columns)
    order = np.argsort(table.column("position").to_numpy(), kind="stable")
    return table.take(pa.array(order))
