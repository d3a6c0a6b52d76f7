"""Stretches: computed packs become finished files. This half of the work knows no database.

A stretch is whole consecutive packs of one window. It ends with its window, before a gap in the
plan, and when it has taken long enough or holds enough records.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from lib.columns import Vectors
from lib.errors import InputError, MachineError
from lib.ledger.checkpoints import CheckpointWriter, FinishedStretch, temporary_name
from lib.network.pipeline import StoppedError
from lib.network.vectors import NonFiniteError
from lib.sequences.plan import Pack

__all__ = ["OpenStretch", "StretchRules", "finished_stretches", "in_stretches"]

Part = TypeVar("Part")

# After these, what was computed before is still good.
_FAILURES = (InputError, MachineError, NonFiniteError, StoppedError)


@dataclass(frozen=True)
class StretchRules:
    """Where the files of an attempt go, what they look like, and when a stretch ends.

    seconds, records: a stretch that has taken as long, or holds as many, ends. token: part of the
    names of unfinished files, if others write for the same attempt.
    """

    folder: Path
    attempt_id: int
    columns: pa.Schema
    footer: Mapping[str, Any]
    seconds: float
    records: int
    token: str = ""


def finished_stretches(
    computed: Iterable[tuple[Pack, Vectors]],
    rules: StretchRules,
    pack_done: Callable[[Pack], None],
) -> Generator[FinishedStretch]:
    """Write computed packs into files, and yield each stretch when its file is finished.

    computed: packs with their vectors, in the order of the plan. `pack_done` is called after each.
    What `computed` raises is raised after the stretch before it has been yielded. A stretch that
    is not yielded leaves no file.
    """
    failures: list[Exception] = []
    yield from in_stretches(
        _until_failure(computed, failures),
        begin=lambda part: _PackStretch(rules, part[0].positions.start),
        done=lambda part: pack_done(part[0]),
    )
    if failures:
        raise failures[0]


def in_stretches(
    parts: Iterable[Part],
    begin: Callable[[Part], OpenStretch[Part]],
    done: Callable[[Part], None],
) -> Generator[FinishedStretch]:
    """Write parts of a plan into files, and yield each stretch when its file is finished.

    begin: opens a stretch for a part, which is then added; done: is told of each part that was. A
    stretch that is not yielded leaves no file.
    """
    stretch: OpenStretch[Part] | None = None
    since = time.monotonic()
    try:
        for part in parts:
            if stretch is not None and not stretch.is_continued_by(part):
                yield stretch.finish(since)
                stretch, since = None, time.monotonic()
            stretch = stretch or begin(part)
            stretch.add(part)
            done(part)
            if stretch.is_due(since):
                yield stretch.finish(since)
                stretch, since = None, time.monotonic()
        if stretch is not None:
            yield stretch.finish(since)
            stretch = None  # whoever asks for more has taken it
    finally:
        if stretch is not None:
            stretch.discard()


class OpenStretch(ABC, Generic[Part]):
    """Consecutive positions of a plan, from `first` on, in a file that is not finished."""

    def __init__(self, rules: StretchRules, first: int) -> None:
        self.rules = rules
        self.positions = range(first, first)
        self.residues = 0
        name = temporary_name(rules.attempt_id, first, rules.token)
        self.writer = CheckpointWriter(rules.folder, name, rules.columns, rules.footer)

    @abstractmethod
    def is_continued_by(self, part: Part) -> bool:
        """Return whether a part belongs into this file: no gap of the plan lies before it."""

    @abstractmethod
    def add(self, part: Part) -> None:
        """Take in the next part."""

    @abstractmethod
    def finish(self, since: float) -> FinishedStretch:
        """Close the file; it waits under its temporary name for the commit."""

    def is_due(self, since: float) -> bool:
        """Return whether the stretch is to end here."""
        late = time.monotonic() - since >= self.rules.seconds
        return late or self.writer.records >= self.rules.records

    def discard(self) -> None:
        """Remove the file, unless it has been committed and so renamed."""
        with suppress(OSError):  # the disk has been reported already
            self.writer.discard()


class _PackStretch(OpenStretch[tuple[Pack, Vectors]]):
    """Computed packs. It ends with their window, too."""

    _ends_window = False

    def is_continued_by(self, part: tuple[Pack, Vectors]) -> bool:
        return part[0].positions.start == self.positions.stop

    def is_due(self, since: float) -> bool:
        return self._ends_window or super().is_due(since)

    def add(self, part: tuple[Pack, Vectors]) -> None:
        pack, vectors = part
        self.writer.add(pack.sequences, vectors)
        self.positions = range(self.positions.start, pack.positions.stop)
        self.residues += sum(len(sequence.residues) for sequence in pack.sequences)
        self._ends_window = pack.ends_window

    def finish(self, since: float) -> FinishedStretch:
        seconds = time.monotonic() - since
        file = self.writer.finish(self.positions, self.residues, seconds)
        return FinishedStretch(file, self.positions, self.residues, seconds)


def _until_failure(
    computed: Iterable[tuple[Pack, Vectors]], failures: list[Exception]
) -> Iterator[tuple[Pack, Vectors]]:
    """Yield packs up to the first failure, which is kept."""
    try:
        yield from computed
    except _FAILURES as failure:
        failures.append(failure)
