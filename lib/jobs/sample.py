"""Sample: the records of a run that are computed again, some drawn by chance and some always."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lib.sequences.records import Owner
from lib.sequences.windows import Sequence, Window

__all__ = ["Sample", "SampledRecord", "draw_sample"]


@dataclass(frozen=True)
class SampledRecord:
    """A record to compute again: its position in the FASTA, its id, its residues as embedded."""

    number: int
    id: str
    residues: str


@dataclass
class Sample:
    """The records to compute again, by number, ascending.

    `drawn` are those drawn by chance. `always` has, as far as there are any, the longest, the
    shortest, a truncated record, two that share a sequence, and if some were copied from an earlier
    run, a copied and a computed one, by what they are there for.
    """

    records: dict[int, SampledRecord] = field(default_factory=dict)
    drawn: list[int] = field(default_factory=list)
    always: dict[str, list[int]] = field(default_factory=dict)


def draw_sample(
    windows: Iterable[Window],
    there: npt.NDArray[np.int64],
    copied: npt.NDArray[np.bool_],
    size: int,
    seed: int,
) -> Sample:
    """Draw `size` records and those that are always there, in one pass over the input.

    there: (N,) the records that the run has, ascending; copied: (N,) which of them were copied. The
    same seed draws the same records. Only the residues of what is chosen are held.
    """
    chance = random.Random(seed)
    places = chance.sample(range(len(there)), min(size, len(there)))
    drawn = {int(there[place]) for place in places}
    done = np.zeros(int(there[-1]) + 1, bool)
    done[there] = True
    kinds = np.zeros(len(done), bool)
    kinds[there] = copied
    special = _Special(chance, kinds if copied.any() else None)
    records: dict[int, SampledRecord] = {}
    for window in windows:
        for sequence in window.sequences:
            owners = [one for one in sequence.owners if one.number < len(done) and done[one.number]]
            if owners:
                special.add(sequence, owners)
                chosen = [owner for owner in owners if owner.number in drawn]
                if chosen:
                    records |= _sampled(sequence, chosen)
    for sequence, owners in special.chosen.values():
        records |= _sampled(sequence, owners)
    always = {
        what: [owner.number for owner in owners] for what, (_, owners) in special.chosen.items()
    }
    return Sample(dict(sorted(records.items())), sorted(drawn), always)


class _Special:
    """The records that are always computed again, chosen while sequences pass by."""

    def __init__(self, chance: random.Random, copied: npt.NDArray[np.bool_] | None) -> None:
        self._chance = chance
        self._copied = copied
        self._seen = {"truncated": 0, "shared": 0, "copied": 0, "computed": 0}
        # What they are there for, to their sequence and the records of it.
        self.chosen: dict[str, tuple[Sequence, list[Owner]]] = {}

    def add(self, sequence: Sequence, owners: list[Owner]) -> None:
        """Look at the next sequence and its records in the run."""
        length = len(sequence.residues)
        if "longest" not in self.chosen or length > self._length("longest"):
            self.chosen["longest"] = sequence, owners[:1]
        if "shortest" not in self.chosen or length < self._length("shortest"):
            self.chosen["shortest"] = sequence, owners[:1]
        truncated = [owner for owner in owners if owner.length > length]
        if truncated:
            self._draw("truncated", sequence, truncated[:1])
        if len(owners) > 1:
            self._draw("shared", sequence, [owners[0], owners[-1]])
        if self._copied is not None:
            what = "copied" if self._copied[owners[0].number] else "computed"
            self._draw(what, sequence, owners[:1])

    def _length(self, what: str) -> int:
        return len(self.chosen[what][0].residues)

    def _draw(self, what: str, sequence: Sequence, owners: list[Owner]) -> None:
        """Keep one of all that come, each with the same chance."""
        self._seen[what] += 1
        if self._chance.randrange(self._seen[what]) == 0:
            self.chosen[what] = sequence, owners


def _sampled(sequence: Sequence, owners: Iterable[Owner]) -> dict[int, SampledRecord]:
    residues = sequence.residues.decode()
    return {owner.number: SampledRecord(owner.number, owner.id, residues) for owner in owners}
