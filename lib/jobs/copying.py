"""Copying: rows of earlier runs become finished files of a new one, by its reuse plan.

A source file is checked whole before a row of it is taken, and only rows are taken whose SHA-256 is
that of the residues in the FASTA file. A source that is lost or altered is named, and what it has
is left to be computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.arrow import arrow_array, numbers
from lib.embeddings.verified import OpenedFile, VerifiedFile
from lib.errors import IdentityRefusedError, MachineError
from lib.jobs.reuse import LostSourceError
from lib.jobs.stretches import OpenStretch, StretchRules, in_stretches
from lib.ledger.checkpoints import FinishedStretch, row_group_slices
from lib.ledger.reuse_plan import ReusePlan, Source
from lib.network.pipeline import StoppedError
from lib.sequences.inventory import WINDOW_RECORDS, Inventory
from lib.sequences.plan import remaining
from lib.sequences.rearranged import rearranged_records
from schema.parquet import EMBEDDED_SHA256
from schema.settings import InputSettings

__all__ = ["Copying", "copied_stretches"]

# Of narrow vectors: what is done for each part would take longer than copying it.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Copying:
    """All that copying needs.

    done: positions that checkpoints cover, ascending and disjoint; verified: checks a source file,
    and raises LostSourceError; stopped: whether to end at the next opportunity; copied: is told how
    many sequences were copied; say: is told of sources that are lost.
    """

    plan: ReusePlan
    input_rules: InputSettings
    inventory: Inventory
    rules: StretchRules
    done: Sequence[range]
    verified: Callable[[Source], VerifiedFile]
    stopped: Callable[[], bool]
    copied: Callable[[int], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class _Rows:
    """The rows of consecutive positions; vectors: one row for each position, checked."""

    source: Source
    positions: range
    owners: pa.Table
    vectors: pa.Table


def copied_stretches(copying: Copying) -> Generator[FinishedStretch]:
    """Copy what no checkpoint covers; yield each stretch when its file is finished.

    A stretch has rows of one run. One that is not yielded leaves no file. Raises StoppedError after
    the last one if it was told to stop, MachineError if the disk fails, and InputError for a file
    that has changed.
    """
    yield from in_stretches(
        _until_stopped(copying),
        begin=lambda rows: _CopiedStretch(copying.rules, rows.positions.start, rows.source),
        done=lambda rows: copying.copied(len(rows.positions)),
    )
    if copying.stopped():
        raise StoppedError


def _until_stopped(copying: Copying) -> Iterator[_Rows]:
    for rows in _sources_rows(copying):
        yield rows
        if copying.stopped():
            return


class _CopiedStretch(OpenStretch[_Rows]):
    """Rows of one run."""

    def __init__(self, rules: StretchRules, first: int, source: Source) -> None:
        super().__init__(rules, first)
        self._source = source
        self._files: list[str] = []

    def is_continued_by(self, part: _Rows) -> bool:
        same = part.source.run_id == self._source.run_id
        return same and part.positions.start == self.positions.stop

    def add(self, part: _Rows) -> None:
        for batch in _batches(part, self.rules.columns):
            self.writer.add_rows(batch)
        self.positions = range(self.positions.start, part.positions.stop)
        self.residues += pc.sum(part.vectors.column("embedded_length")).as_py()
        if part.source.file not in self._files:
            self._files.append(part.source.file)

    def finish(self, since: float) -> FinishedStretch:
        seconds = time.monotonic() - since
        run, uuid = self._source.run_id, self._source.run_uuid
        reused = {"run": run, "uuid": uuid, "files": self._files, "residues": self.residues}
        file = self.writer.finish(self.positions, 0, seconds, reused)
        return FinishedStretch(file, self.positions, 0, seconds, run, self.residues)


def _sources_rows(copying: Copying) -> Iterator[_Rows]:
    """Yield what is to be copied in the order of the plan, and leave out what is lost."""
    plan, lost = copying.plan, dict[Source, str]()
    tables = rearranged_records(
        copying.input_rules,
        copying.inventory,
        plan.reused,
        list(_ranges(len(plan), copying.done)),
        copying.rules.folder,
    )
    reader = _Reader(copying)
    for positions, owners in tables:
        for source in plan.sources:
            part = _overlap(positions, source.positions)
            if not part or source in lost:
                continue
            try:
                yield from reader.rows(source, part, owners)
            except LostSourceError as error:
                if str(error) not in lost.values():  # of a pruned run, all files have the same
                    copying.say(f"not reused: {error}")
                lost[source] = str(error)
        del owners  # before those of the next range are in memory, too


class _Reader:
    """Reads rows of source files, each checked once before the first."""

    def __init__(self, copying: Copying) -> None:
        self._copying = copying
        self._last: tuple[Source, VerifiedFile] | None = None

    def rows(self, source: Source, part: range, owners: pa.Table) -> Iterator[_Rows]:
        """Yield the rows of some positions; raises LostSourceError at the first that is not there.

        owners: the records of at least these positions, by position.
        """
        verified = self._file(source)
        try:
            with verified.opened() as file:
                yield from self._groups(source, part, owners, file)
        except (IdentityRefusedError, MachineError, KeyError) as error:
            raise LostSourceError(str(error)) from None

    def _file(self, source: Source) -> VerifiedFile:
        if self._last is None or self._last[0] != source:
            self._last = source, self._copying.verified(source)
        return self._last[1]

    def _groups(
        self, source: Source, part: range, owners: pa.Table, file: OpenedFile
    ) -> Iterator[_Rows]:
        """Yield rows of one row group after the other, and no more at once than a file gets."""
        columns = self._copying.rules.columns
        describing = {*owners.column_names} - {"embedded_length", EMBEDDED_SHA256}
        names = [name for name in columns.names if name not in describing]
        rows = self._copying.plan.rows[part.start : part.stop]
        places = numbers(owners.column("position"))
        most = min(_ROWS_AT_ONCE, self._copying.rules.records)
        for chosen, taken in _taken(file, names, rows, most):
            positions = part[chosen.start : chosen.stop]
            start, stop = np.searchsorted(places, [positions.start, positions.stop]).tolist()
            vectors = _fitting(taken, columns, source)
            yield _checked(_Rows(source, positions, owners.slice(start, stop - start), vectors))


def _taken(
    file: OpenedFile, names: Sequence[str], rows: npt.NDArray[np.int32], most: int
) -> Iterator[tuple[slice, pa.Table]]:
    """Yield columns of chosen rows of a file, in parts of at most so many: which, and they.

    rows: (N,) ascending.
    """
    stops = np.cumsum(file.row_counts)
    ends = np.searchsorted(rows, stops).tolist()
    starts = [0, *stops.tolist()]
    for group, first, end in zip(file.row_groups, [0, *ends], ends, strict=False):
        if end == first:
            continue
        start = starts[group]
        for batch in file.batches(group, names, most):
            stop = int(np.searchsorted(rows, start + batch.num_rows))
            if stop > first:
                places = rows[first:stop] - start
                yield slice(first, stop), _at(batch.select(names), places)
            first, start = stop, start + batch.num_rows
            if first == end:
                break


def _at(table: pa.Table, places: npt.NDArray[np.integer[Any]]) -> pa.Table:
    """Return the rows of a table at some places, without a copy if those are all, in order."""
    if np.array_equal(places, np.arange(table.num_rows)):
        return table
    return table.take(arrow_array(places, pa.int64()))


def _fitting(rows: pa.Table, columns: pa.Schema, source: Source) -> pa.Table:
    """Return rows in the types of a file's columns: float32 that is to be float16 is rounded."""
    for number, name in enumerate(rows.column_names):
        kind = columns.field(name).type
        if rows.schema.field(number).type == kind:
            continue
        rounded = rows.column(name).cast(kind)
        if not np.isfinite(numbers(pc.list_flatten(rounded))).all():
            raise LostSourceError(f"run {source.run_id}: {source.file}: {name} exceeds {kind}")
        rows = rows.set_column(number, columns.field(name), rounded)
    return rows


def _checked(rows: _Rows) -> _Rows:
    """Return rows; raises LostSourceError unless each is of the residues of its owners."""
    found = _at(rows.vectors.select([EMBEDDED_SHA256]), _index(rows))
    if not found.column(0).equals(rows.owners.column(EMBEDDED_SHA256)):
        place = f"run {rows.source.run_id}: {rows.source.file}"
        raise LostSourceError(f"{place}: {EMBEDDED_SHA256} is not that of the residues")
    return rows


def _index(rows: _Rows) -> npt.NDArray[np.int64]:
    """Return (owners,) the row of `vectors` that each owner gets."""
    positions: npt.NDArray[np.int64] = numbers(rows.owners.column("position"))
    return positions - rows.positions.start


def _batches(rows: _Rows, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file, in parts of about a row group."""
    index = _index(rows)
    sizes = np.zeros(len(rows.positions), np.int64)
    for name in columns.names:
        kind = columns.field(name).type
        if pa.types.is_fixed_size_list(kind):
            sizes += kind.list_size * kind.value_type.bit_width // 8
        elif pa.types.is_list(kind):
            lengths = numbers(pc.list_value_length(rows.vectors.column(name)))
            sizes += lengths * (kind.value_type.bit_width // 8)
    for part in row_group_slices(sizes[index]):
        owners = rows.owners.slice(part.start, part.stop - part.start)
        vectors = _at(rows.vectors, index[part])
        arrays = [
            (owners if name in owners.column_names else vectors).column(name).combine_chunks()
            for name in columns.names
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=columns)


def _ranges(reused: int, done: Sequence[range]) -> Iterator[range]:
    """Yield the positions of reused sequences that no checkpoint covers, in parts of a window."""
    for left in remaining(range(reused), done):
        yield from _cut(left, WINDOW_RECORDS)


def _cut(positions: range, most: int) -> Iterator[range]:
    for start in range(positions.start, positions.stop, most):
        yield range(start, min(start + most, positions.stop))


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
