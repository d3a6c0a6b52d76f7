"""Reused sequences: the first of a plan, in the order of what they are copied from.

What is left to compute follows them, in windows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lib.parts import bounded_parts
from lib.sequences.digests import Index, index_type
from lib.sequences.inventory import WINDOW_RECORDS, WINDOW_RESIDUES, Inventory
from lib.sequences.windows import Sequence, Window, read_windows
from schema.settings import InputSettings

__all__ = ["Reused", "bounded_windows", "planned_lengths", "planned_windows"]


class Reused:
    """The sequences of an input that are copied from earlier runs.

    records: (R,) the first record of each, in the order of the plan; records_total: of the input.
    """

    def __init__(self, records: Index, records_total: int) -> None:
        self._kind = index_type(records_total)
        self.records: Index = records.astype(self._kind)
        self._total = records_total

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def places(self) -> Index:
        """(records,) the position in the plan of what has its first record there; -1 for others."""
        places: Index = np.full(self._total, -1, self._kind)
        places[self.records] = np.arange(len(self.records), dtype=self._kind)
        return places


def planned_windows(
    rules: InputSettings, inventory: Inventory, reused: Reused | None
) -> Iterator[Window]:
    """Yield the windows of what is computed; raises what `read_windows` raises.

    What reuse leaves of several windows of the input is one window, as far as the bounds allow.
    """
    if reused is None:
        return read_windows(rules, inventory)
    return _joined(read_windows(rules, inventory, reused.places >= 0), len(reused))


def planned_lengths(inventory: Inventory, reused: Reused | None) -> npt.NDArray[np.int32]:
    """Return (sequences,) embedded residues, in the order of the plan: first of what is reused."""
    if reused is None:
        return inventory.lengths
    left = inventory.first_records()
    left = left[reused.places[left] < 0]
    lengths = inventory.record_lengths[left]
    window_of = np.searchsorted([one.stop_record for one in inventory.windows], left, side="right")
    parts = [inventory.record_lengths[reused.records]]
    joined: list[npt.NDArray[np.int32]] = []
    for part in np.split(lengths, np.flatnonzero(np.diff(window_of)) + 1):
        if not _fits(sum(map(len, joined)), sum(int(one.sum()) for one in joined), part):
            parts.append(-np.sort(-np.concatenate(joined)))
            joined = []
        joined.append(part)
    return np.concatenate([*parts, -np.sort(-np.concatenate(joined))])


def bounded_windows(positions: range, lengths: npt.NDArray[np.int32]) -> Iterator[range]:
    """Cut positions into parts that have the bounds of a window.

    lengths: embedded residues by position.
    """
    here = lengths[positions.start : positions.stop]
    for part in bounded_parts(here, WINDOW_RESIDUES, WINDOW_RECORDS):
        yield positions[part.start : part.stop]


def _joined(windows: Iterable[Window], position: int) -> Iterator[Window]:
    """Yield windows, as far as they fit joined into one; the first has its first at `position`."""
    joined: list[Sequence] = []
    residues = 0
    for window in windows:
        lengths = np.array([len(sequence.residues) for sequence in window.sequences], np.int32)
        if not _fits(len(joined), residues, lengths):
            yield _window(position, joined)
            position += len(joined)
            joined, residues = [], 0
        joined += window.sequences
        residues += int(lengths.sum())
    if joined:
        yield _window(position, joined)


def _fits(sequences: int, residues: int, more: npt.NDArray[np.int32]) -> bool:
    """Return whether a window with so many sequences and residues takes in `more` lengths."""
    if not sequences:
        return True
    return (
        sequences + len(more) <= WINDOW_RECORDS
        and residues + int(more.sum(dtype=np.int64)) <= WINDOW_RESIDUES
    )


def _window(first_position: int, sequences: list[Sequence]) -> Window:
    # sorted() is stable: sequences of equal length stay in file order.
    return Window(first_position, sorted(sequences, key=lambda one: -len(one.residues)))
