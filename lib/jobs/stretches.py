"""Stretches: computed packs become finished files. This half of the work knows no database.

A stretch is whole consecutive packs of one window. It ends with its window, before a gap in the
plan, and when it has taken long enough or holds enough records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lib.columns import Vectors
from lib.errors import InputError, MachineError
from lib.ledger.checkpoints import CheckpointWriter, temporary_name
from lib.ledger.commit import FinishedStretch
from lib.network.pipeline import StoppedError
from lib.network.vectors import NonFiniteError
from lib.sequences.plan import Pack

__all__ = ["StretchRules", "finished_stretches"]

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
    stretch: _Stretch | None = None
    since = time.monotonic()
    try:
        for pack, vectors in _until_failure(computed, failures):
            if stretch is not None and not stretch.is_continued_by(pack):
                yield stretch.finish(since)
                stretch, since = None, time.monotonic()
            stretch = stretch or _Stretch(rules, pack)
            stretch.add(pack, vectors)
            pack_done(pack)
            if stretch.is_due(since):
                yield stretch.finish(since)
                stretch, since = None, time.monotonic()
        if stretch is not None:
            yield stretch.finish(since)
            stretch = None  # whoever asks for more has taken it
    finally:
        if stretch is not None:
            stretch.discard()
    if failures:
        raise failures[0]


def _until_failure(
    computed: Iterable[tuple[Pack, Vectors]], failures: list[Exception]
) -> Iterator[tuple[Pack, Vectors]]:
    """Yield packs up to the first failure, which is kept."""
    try:
        yield from computed
    except _FAILURES as failure:
        failures.append(failure)


class _Stretch:
    """Packs in a file that is not finished."""

    def __init__(self, rules: StretchRules, first: Pack) -> None:
        self._rules = rules
        self._ends_window = False
        self._positions = range(first.positions.start, first.positions.start)
        self._residues = 0
        name = temporary_name(rules.attempt_id, first.positions.start, rules.token)
        self._writer = CheckpointWriter(rules.folder, name, rules.columns, rules.footer)

    def is_continued_by(self, pack: Pack) -> bool:
        """Return whether no gap of the plan lies before a pack."""
        return pack.positions.start == self._positions.stop

    def is_due(self, since: float) -> bool:
        """Return whether the stretch is to end here."""
        rules = self._rules
        return (
            self._ends_window
            or time.monotonic() - since >= rules.seconds
            or self._writer.records >= rules.records
        )

    def add(self, pack: Pack, vectors: Vectors) -> None:
        """Take in the next pack."""
        self._writer.add(pack.sequences, vectors)
        self._positions = range(self._positions.start, pack.positions.stop)
        self._residues += sum(len(sequence.residues) for sequence in pack.sequences)
        self._ends_window = pack.ends_window

    def finish(self, since: float) -> FinishedStretch:
        """Close the file; it waits under its temporary name for the commit."""
        seconds = time.monotonic() - since
        file = self._writer.finish(self._positions, self._residues, seconds)
        return FinishedStretch(file, self._positions, self._residues, seconds)

    def discard(self) -> None:
        """Remove the file, unless it has been committed and so renamed."""
        with suppress(OSError):  # the disk has been reported already
            self._writer.discard()
