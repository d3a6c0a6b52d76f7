"""Rearranged records: reused ones in the order of the plan, by way of a temporary file.

The plan has them in the order of what they are copied from, which can be any order of the input.
Memory holds a few thousand records, then one range of the plan. The file has no name: it is gone
when it is closed, however the process ends.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from lib.arrow import arrow_array, numbers
from lib.files import disk_errors
from lib.sequences.digests import Index
from lib.sequences.inventory import Inventory
from lib.sequences.records import Owner, Record, read_same_records
from lib.sequences.reused import Reused
from lib.sequences.windows import Sequence as FastaSequence
from lib.sequences.windows import Window
from schema.parquet import DESCRIBING, SEQUENCE_MD5
from schema.settings import InputSettings

__all__ = ["rearranged_records", "rearranged_windows"]

# A row per record that has a reused sequence.
_COLUMNS = DESCRIBING.insert(0, pa.field("position", pa.int64()))
_RESIDUES = pa.field("residues", pa.binary())  # only in the first row of a position
_RECORDS = 8192  # that are read before they are written


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
    residues: whether it has what is embedded, too. Raises what `read_same_records` raises, and
    MachineError if the disk fails.
    """
    if not ranges:
        return
    columns = _COLUMNS.append(_RESIDUES) if residues else _COLUMNS
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        # For each range, the place and the size in the file of every part of it.
        parts = [array("q") for _ in ranges]
        records = read_same_records(rules, inventory.files)
        for start in range(0, inventory.records, _RECORDS):
            firsts = inventory.same_as[start : start + _RECORDS]
            positions = _within(reused.places[firsts], ranges)
            _scatter(_rows(records, firsts, positions, columns), ranges, file, parts)
        for _ in records:  # none, but only at the end is the digest of the file compared
            pass
        for asked, places in zip(ranges, parts, strict=True):
            yield asked, _gather(places, file, columns)


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


def _within(positions: Index, ranges: Sequence[range]) -> Index:
    """Return positions with -1 for those that are in none of the ranges."""
    after = np.searchsorted([one.stop for one in ranges], positions, side="right")
    starts = np.array([*(one.start for one in ranges), np.iinfo(np.int64).max])
    return np.where(positions >= np.maximum(starts[after], 0), positions, -1)


def _rows(
    records: Iterator[Record],
    firsts: Index,
    positions: Index,
    columns: pa.Schema,
) -> pa.RecordBatch:
    """Read the next records; return those that have a position, by position.

    firsts: (records,) the first record with the same residues; positions: (records,), -1 for none.
    """
    cells: list[list[object]] = [[] for _ in columns]
    # Lists of columns, as millions of rows in Python would keep its garbage collector busy.
    add = [column.append for column in cells]
    for first, position, record in zip(firsts.tolist(), positions.tolist(), records, strict=False):
        if position >= 0:
            number, name, description, length, md5 = record.owner
            digest = hashlib.sha256(record.residues).digest()
            letters = record.residues if number == first else None
            row = position, number, name, description, length, len(record.residues), digest, md5
            for append, cell in zip(add, (*row, letters), strict=False):
                append(cell)
    arrays = [arrow_array(column, kind) for column, kind in zip(cells, columns.types, strict=True)]
    order = np.argsort(np.array(cells[0], np.int64), kind="stable")
    return pa.RecordBatch.from_arrays(arrays, schema=columns).take(arrow_array(order, pa.int64()))


def _scatter(
    rows: pa.RecordBatch, ranges: Sequence[range], file: IO[bytes], parts: Sequence[array[int]]
) -> None:
    """Write what each range has of some rows, which are by position."""
    positions = numbers(rows.column("position"))
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
    order = np.argsort(numbers(table.column("position")), kind="stable")
    return table.take(arrow_array(order, pa.int64()))
