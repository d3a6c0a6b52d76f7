"""Windows: the input read for the work, a bounded number of consecutive records at a time.

Of identical sequences only the first is computed, for all records that share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from lib.errors import InputError
from lib.sequences.inputs import source_sha256
from lib.sequences.inventory import Inventory, WindowDigest, WindowSummary
from lib.sequences.records import Owner, Record, read_same_records
from schema.settings import InputSettings

__all__ = ["Sequence", "Window", "read_windows"]

_RECORDS = 4096  # that are read before they are digested


@dataclass
class Sequence:
    """A sequence to compute once, and the records that get its vectors, in file order."""

    residues: bytes
    owners: list[Owner]


@dataclass(frozen=True)
class Window:
    """Sequences that are planned together.

    first_position: the position of the first in the plan; sequences: longest first, then by
    record.
    """

    first_position: int
    sequences: list[Sequence]


def read_windows(
    rules: InputSettings, inventory: Inventory, skipped: npt.NDArray[np.bool_] | None = None
) -> Iterator[Window]:
    """Yield the windows of the plan, each checked to be what preflight read.

    skipped: (records,) true for the first record of each sequence to leave out. At the end of each
    file, which is before the last window, the digest of its bytes is compared too. Raises
    InputError if a file has changed since.
    """
    records = read_same_records(rules, inventory.files)
    position = 0
    for summary in inventory.windows:
        sequences = _sequences(records, summary, inventory, skipped)
        if summary.stop_record == inventory.records and next(records, None) is not None:
            raise _changed(summary, inventory)
        yield Window(position, sequences)
        position += len(sequences)


def _sequences(
    records: Iterator[Record],
    summary: WindowSummary,
    inventory: Inventory,
    skipped: npt.NDArray[np.bool_] | None,
) -> list[Sequence]:
    """Read the records of a window; return its sequences in the order of the plan."""
    digest = WindowDigest()
    sequences: dict[int, Sequence] = {}
    for record in _digested(islice(records, summary.stop_record - summary.first_record), digest):
        first = int(inventory.same_as[record.number])
        if skipped is not None and skipped[first]:
            continue
        strays = inventory.strays.get(first, [])
        if first == record.number:
            sequences[first] = Sequence(record.residues, [record.owner, *strays])
        elif first in sequences:
            # Strays come from later windows: in file order this record is before them.
            owners = sequences[first].owners
            owners.insert(len(owners) - len(strays), record.owner)
    if digest.digest() != summary.digest:
        raise _changed(summary, inventory)
    # sorted() is stable: sequences of equal length stay in file order.
    return sorted(sequences.values(), key=lambda sequence: -len(sequence.residues))


def _digested(records: Iterator[Record], digest: WindowDigest) -> Iterator[Record]:
    """Yield records that are digested, some at a time: most of a window may be skipped."""
    while read := list(islice(records, _RECORDS)):
        digest.add(read)
        yield from read


def _changed(window: WindowSummary, inventory: Inventory) -> InputError:
    """Return the error that names what has changed of the files that a window is from."""
    files = [
        file
        for file in inventory.files
        if file.first_record < window.stop_record
        and file.first_record + file.records > window.first_record
    ]
    changed = [one for one in files if len(files) > 1 and source_sha256(one.source) != one.sha256]
    names = ", ".join(file.source.name for file in changed or files)
    return InputError(f"{names}: changed while it was being read")
