"""Patience: how long a worker may take for a stretch before it counts as one that hangs."""

from __future__ import annotations

import math
from time import monotonic

__all__ = ["Patience"]

# A worker hangs if it takes ten times as long as the slowest stretch so far did for its cost: GPUs
# of one cluster differ by less, and costs are estimated better. Not before ten minutes: a disk that
# stalls, or a machine that swaps, recovers within them, and longer costs more than the work again.
_FACTOR = 10.0
_LEAST_SECONDS = 600.0
# If the driver itself has not looked for so long, it is not the workers that are late.
_STALLED_SECONDS = 60.0


class Patience:
    """The clock of a driver, and how slow its workers have been so far."""

    def __init__(self) -> None:
        self._slowest: float | None = None  # seconds per cost
        self._looked = monotonic()

    def now(self) -> float:
        """Return the time in seconds."""
        return monotonic()

    def learn(self, seconds: float, cost: float) -> None:
        """Take into account how long a stretch took."""
        self._slowest = max(seconds / cost, self._slowest or 0.0)

    def most_seconds(self, cost: float) -> float:
        """Return how long a stretch may take; before one is learnt, as long as it likes."""
        if self._slowest is None:
            return math.inf
        return max(_LEAST_SECONDS, _FACTOR * self._slowest * cost)

    def stalled(self) -> float:
        """Return the seconds since the last call if the driver was stopped in between, else 0."""
        now = monotonic()
        since, self._looked = now - self._looked, now
        return since if since > _STALLED_SECONDS else 0.0
