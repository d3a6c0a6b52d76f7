"""Division: the packs that are left of a run, cut into the stretches that workers are given.

A stretch takes about as long as checkpoints are to be apart, but every worker gets several of
them, and towards the end they shrink, so that the workers end together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lib.columns import vector_bytes
from lib.sequences.plan import Pack
from schema.parquet import VectorColumn

__all__ = ["Division", "SizeRules", "Stretch"]

# A stretch aims at this share of checkpoint_seconds: its last packs may be slower than the first.
_AIM = 0.75
_LEAST_PER_WORKER = 8
_LEAST_SECONDS = 1.0  # so that a file and a transaction cost next to nothing
_LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class SizeRules:
    """What bounds a stretch.

    seconds, records: [output] checkpoint_seconds and checkpoint_records. at_once: packs that a
    worker computes at once, the fewest that it gets. columns, hidden_dim: what is kept of a record.
    """

    seconds: float
    records: int
    at_once: int
    columns: Sequence[VectorColumn]
    hidden_dim: int

    def vector_bytes(self, pack: Pack) -> int:
        """Return the bytes of a pack's vectors in float32."""
        lengths = [len(one.residues) for one in pack.sequences for _ in one.owners]
        residues = np.array(lengths, np.int64)
        return sum(vector_bytes(one, residues, self.hidden_dim, "float32") for one in self.columns)


@dataclass(frozen=True)
class Stretch:
    """Consecutive packs of one window, for one worker; cost: as `cost_of` counts it."""

    packs: Sequence[Pack]
    cost: float

    @property
    def positions(self) -> range:
        """The places of its sequences in the plan."""
        return range(self.packs[0].positions.start, self.packs[-1].positions.stop)

    def first(self, packs: int) -> Stretch:
        """Return the stretch of its first so many packs."""
        return self._part(self.packs[:packs])

    def without(self, packs: int) -> Stretch:
        """Return the stretch of the packs after its first so many."""
        return self._part(self.packs[packs:])

    def _part(self, packs: Sequence[Pack]) -> Stretch:
        return Stretch(packs, self.cost * len(packs) / len(self.packs))

    @property
    def records(self) -> int:
        """How many records its file has."""
        return sum(len(one.owners) for pack in self.packs for one in pack.sequences)

    @property
    def lengths(self) -> list[int]:
        """The residues of each of its sequences."""
        return [len(one.residues) for pack in self.packs for one in pack.sequences]


class Division:
    """Cuts packs into stretches, one at a time, as workers become free."""

    def __init__(
        self,
        packs: Iterable[Pack],
        rules: SizeRules,
        cost_of: Callable[[Sequence[int]], float],
        cost_left: float,
    ) -> None:
        """Begin to cut; cost_left: of all packs together, cost_of: of sequences by length."""
        self._packs: Iterator[Pack] = iter(packs)
        self._rules = rules
        self._cost_of = cost_of
        self._total = self._left = cost_left
        self._ahead: Pack | None = None

    def next(self, rate: float | None, workers: int) -> Stretch | None:
        """Return the next stretch for a worker that does `rate` cost in a second; None at the end.

        rate: None if it is not known; the stretch is then small. Raises what reading packs raises.
        """
        rate = rate or 0.0
        share = min(self._total / (_LEAST_PER_WORKER * workers), self._left / (2 * workers))
        limit = min(_AIM * self._rules.seconds * rate, max(share, _LEAST_SECONDS * rate))
        taken: list[Pack] = []
        cost, records, size = 0.0, 0, 0
        while (pack := self._look()) is not None:
            more = self._cost_of([len(sequence.residues) for sequence in pack.sequences])
            owners = sum(len(sequence.owners) for sequence in pack.sequences)
            large = self._rules.vector_bytes(pack)
            if taken:
                if taken[-1].ends_window or taken[-1].positions.stop != pack.positions.start:
                    break
                if records >= self._rules.records or size + large > _LARGEST_BYTES:
                    break
                if len(taken) >= self._rules.at_once and cost + more > limit:
                    break
            taken.append(pack)
            self._ahead = None
            cost, records, size = cost + more, records + owners, size + large
        if not taken:
            return None
        self._left = max(0.0, self._left - cost)
        return Stretch(taken, cost)

    def _look(self) -> Pack | None:
        """Return the next pack, which stays the next until it is taken."""
        if self._ahead is None:
            self._ahead = next(self._packs, None)
        return self._ahead
