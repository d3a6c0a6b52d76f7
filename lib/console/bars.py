"""Bars: the progress of a run or a download, drawn on a terminal or printed once a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lib.console.output import note, terminal_width
from lib.units import count, duration, first_within, size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lib.jobs.progress import Progress

__all__ = ["ResidueBar", "download_bar"]

_SECONDS_BETWEEN_LINES = 60.0
# Of `embedding  12%|`, a short bar and the sign behind it.
_BAR_WIDTH = len("embedding 100%|") + 8 + len("| ")


class ResidueBar:
    """Shows the progress of a run.

    On a terminal as a bar; elsewhere as a line every minute and one at the end.
    """

    def __init__(self, progress: Progress) -> None:
        from tqdm import tqdm  # here, as history has no bar and starts in a moment

        self._on_terminal = sys.stderr.isatty()
        self._progress = progress
        self._line_is_due = progress.elapsed + _SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            total=progress.residues_total,
            initial=progress.residues_before,
            bar_format="embedding {percentage:3.0f}%|{bar}| {desc}",
            desc=_describe_progress(progress, self._room()),
            miniters=0,
            mininterval=0.2,
            ncols=self._columns(),
            disable=not self._on_terminal,
            file=sys.stderr,
        )

    def advance(self, lengths: Sequence[int]) -> None:
        """Count a pack as done; lengths: (N,) residues of its sequences."""
        self._progress.advance(lengths)
        self._show(sum(lengths))

    def copied(self, sequences: int) -> None:
        """Count sequences that were copied."""
        self._progress.copied(sequences)
        self._show(0)

    def expect(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count on more work; lengths: (N,) residues of its sequences."""
        self._progress.expect(lengths)
        self._bar.total = self._progress.residues_total

    def _show(self, residues: int) -> None:
        self._bar.ncols = self._columns()
        words = _describe_progress(self._progress, self._room())
        self._bar.set_description_str(words, refresh=False)
        self._bar.update(residues)
        if not self._on_terminal and self._progress.elapsed >= self._line_is_due:
            self._say()

    def _columns(self) -> int | None:
        """Return the columns of the terminal but for the last, which makes some of them wrap."""
        return terminal_width(sys.stderr) - 1 if self._on_terminal else None

    def _room(self) -> int:
        """Return how many characters fit behind the bar."""
        return (self._columns() or sys.maxsize) - _BAR_WIDTH

    def __enter__(self) -> ResidueBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self._on_terminal:
            self._say()

    def _say(self) -> None:
        note(f"embedding: {_describe_progress(self._progress)}")
        self._line_is_due = self._progress.elapsed + _SECONDS_BETWEEN_LINES


def _describe_progress(progress: Progress, room: int = sys.maxsize) -> str:
    """Return `3,100 of 5,000 residues (2,000 before), 12 res/s, 2 min 38 s left`.

    Before it stands `700 sequences copied, ` if any were. What does not fit `room` characters is
    left out: the time left comes last.
    """
    copied = progress.sequences_copied
    if copied and not progress.residues_total:
        return f"{count(copied)} sequences copied"
    copies = f"{count(copied)} sequences copied, " if copied else ""
    done = f"{count(progress.residues_done)} of {count(progress.residues_total)} residues"
    before = f" ({count(progress.residues_before)} before)" if progress.residues_before else ""
    rate = "" if progress.rate is None else f", {count(progress.rate)} res/s"
    left = ""
    if progress.seconds_left is not None and progress.residues_done < progress.residues_total:
        left = f"{duration(progress.seconds_left)} left"
    after = f", {left}" if left else ""
    forms = [f"{copies}{done}{before}{rate}{after}", f"{done}{before}{rate}{after}"]
    forms += [f"{done}{rate}{after}", f"{done}{after}", left]
    return first_within(room, forms)


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that shows the bytes received, and the total if it is known.

    On a terminal as a bar; elsewhere as a line every minute and one at the end.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    line, line_is_due = f"{name}: nothing", time.monotonic() + _SECONDS_BETWEEN_LINES

    def show(received: int, total: int | None) -> None:
        nonlocal line, line_is_due
        bar.total = total
        bar.update(received - bar.n)
        line = f"{name}: {size(received)}" + (f" of {size(total)}" if total else "")
        if not on_terminal and time.monotonic() >= line_is_due:
            note(line)
            line_is_due = time.monotonic() + _SECONDS_BETWEEN_LINES

    bar = tqdm(desc=name, unit="B", unit_scale=True, disable=not on_terminal, file=sys.stderr)
    with bar:
        yield show
    if not on_terminal:
        note(line)
