"""Progress: how much of a run is done, and how long what is left will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Progress", "computing_cost"]

# How much longer an operation of attention takes than one of the large matrix products: measured
# on CPU at widths 320 to 1280 as 1.0 to 1.6 in float32, 1.5 to 2.9 in bfloat16.
_ATTENTION = 1.6
# Share of a run's cost over which the speed is averaged: the last work tells most about the next.
_RECENT = 0.1
_CHUNK = 1 << 20


class Progress:
    """Counts residues, and times packs by what they cost.

    A token of a sequence of s tokens takes 24 d² operations in the matrix products of a layer of
    width d and 4 d s in its attention, so that the long sequences of a window, which come first,
    are dearer than the others. `residues_before` were embedded by earlier attempts.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        hidden_dim: int,
        done: Sequence[range] = (),
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count now.

        lengths: (sequences,) residues in the order of the plan; done: stretches of the plan that
        earlier attempts committed; at_once: packs that are computed at once; clock: tells seconds.
        """
        earlier = [lengths[stretch.start : stretch.stop] for stretch in done]
        self._width = hidden_dim
        self.residues_total = int(lengths.sum(dtype=np.int64))
        self.residues_before = sum(int(part.sum(dtype=np.int64)) for part in earlier)
        self.residues_done = self.residues_before
        total = computing_cost(lengths, hidden_dim)
        self._cost_left = total - sum(computing_cost(part, hidden_dim) for part in earlier)
        self._scale = _RECENT * total
        self._clock = clock
        self._started = self._began = self._last = self._timed = clock()
        self._seconds, self._cost_of_seconds = 0.0, 0.0
        self._at_once = at_once
        self._packs, self._cost_of_packs = 0, 0.0
        self.sequences_copied = 0

    def expect(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count on more work; lengths: (N,) residues of its sequences."""
        cost = computing_cost(lengths, self._width)
        self.residues_total += int(lengths.sum(dtype=np.int64))
        self._cost_left += cost
        self._scale += _RECENT * cost

    def copied(self, sequences: int) -> None:
        """Count sequences that were copied; the time since the last work was not spent on packs."""
        self.sequences_copied += sequences
        self._began += self._clock() - self._last
        self._last = self._timed = self._clock()

    def advance(self, lengths: Sequence[int]) -> None:
        """Count a pack as done; lengths: (N,) residues of its sequences."""
        cost = computing_cost(np.asarray(lengths), self._width)
        self._last = self._clock()
        self._cost_left -= cost
        self.residues_done += sum(lengths)
        self._packs += 1
        self._cost_of_packs += cost
        # Packs that are computed at once end at once: the time of one alone tells nothing.
        if self._packs % self._at_once == 0:
            self._count_time()

    def _count_time(self) -> None:
        """Count what the packs since the last time cost, and the time that they took."""
        if self._packs == 2 * self._at_once:
            # The first packs also warm things up: they tell of the speed until there are others.
            self._seconds, self._cost_of_seconds = 0.0, 0.0
        faded = math.exp(-self._cost_of_packs / self._scale)
        self._seconds = self._seconds * faded + self._last - self._timed
        self._cost_of_seconds = self._cost_of_seconds * faded + self._cost_of_packs
        self._timed, self._cost_of_packs = self._last, 0.0

    @property
    def seconds(self) -> float:
        """Seconds that packs have taken up to the last one."""
        return self._last - self._began

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning to whatever was counted last."""
        return self._last - self._started

    @property
    def seconds_left(self) -> float | None:
        """Seconds that what is left will take from the last pack on; None before it is known."""
        if not self._cost_of_seconds:
            return None
        return max(self._cost_left, 0.0) * self._seconds / self._cost_of_seconds

    @property
    def rate(self) -> float | None:
        """Residues per second of this attempt; None before its first pack."""
        return (self.residues_done - self.residues_before) / self.seconds if self.seconds else None


def computing_cost(lengths: npt.NDArray[Any], hidden_dim: int) -> float:
    """Return what sequences cost, in operations per layer over 4 d: Σ s (6 d + a s).

    lengths: (N,) residues per sequence. hidden_dim: d, the width of the network.
    """
    cost = 0.0
    for start in range(0, len(lengths), _CHUNK):
        tokens = lengths[start : start + _CHUNK].astype(np.float64) + 2
        cost += float(tokens @ (6 * hidden_dim + _ATTENTION * tokens))
    return cost
