"""The plan: the order of work, and the packs that go through the network together.

A plan depends only on the input and on the numbers given here, so every attempt on a run makes the
same one, and a plan can be made where there is no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lib.sequences.inventory import WINDOW_RECORDS, WINDOW_RESIDUES
from lib.sequences.windows import Sequence as FastaSequence
from lib.sequences.windows import Window

__all__ = ["PLAN", "Pack", "packs_left", "plan_packs", "remaining"]

# Part of a run's identity: a run that was planned with other bounds cannot be resumed.
PLAN = f"windows of {WINDOW_RECORDS} records or {WINDOW_RESIDUES} residues, longest first"

# Smaller packs are slower: the network's fixed cost per pack begins to show.
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class Pack:
    """Sequences that go through the network together, end to end, without padding.

    positions: the positions of the sequences in the plan; ends_window: whether its last sequence
    is the last of its window. A stretch never reaches beyond such a pack.
    """

    positions: range
    sequences: Sequence[FastaSequence]
    ends_window: bool = False


def packs_left(
    windows: Iterable[Window], tokens_per_pack: int, at_once: int, done: Sequence[range]
) -> Iterator[Pack]:
    """Yield the packs that no checkpoint covers, in the order of the plan.

    tokens_per_pack, at_once: as in `plan_packs`; done: the positions that checkpoints cover,
    ascending and disjoint. `windows` is read one window at a time, when its first pack is asked
    for. Raises what reading `windows` raises.
    """
    for window in windows:
        first, stop = window.first_position, window.first_position + len(window.sequences)
        covered = [one for one in done if one.stop > first and one.start < stop]
        if not any(remaining(range(first, stop), covered)):
            continue
        lengths = [len(sequence.residues) for sequence in window.sequences]
        for pack in plan_packs(lengths, tokens_per_pack, at_once):
            for part in remaining(range(first + pack.start, first + pack.stop), covered):
                sequences = window.sequences[part.start - first : part.stop - first]
                yield Pack(part, sequences, ends_window=part.stop == stop)


def plan_packs(lengths: Sequence[int], tokens_per_pack: int, at_once: int = 1) -> list[range]:
    """Cut sequences into packs of at most `tokens_per_pack` tokens.

    lengths: (N,) residues per sequence, in the order of the plan. A sequence longer than the
    budget is a pack of its own. Tokens are residues + 2 (<cls>, <eos>). at_once: how many packs
    are computed at once; if several, the last packs get smaller, so that they end together.
    """
    packs = []
    start, tokens = 0, 0
    left = sum(lengths) + 2 * len(lengths)
    budget = _budget(left, tokens_per_pack, at_once)
    for i, residues in enumerate(lengths):
        size = residues + 2
        if tokens and tokens + size > budget:
            packs.append(range(start, i))
            left -= tokens
            budget = _budget(left, tokens_per_pack, at_once)
            start, tokens = i, 0
        tokens += size
    if tokens:
        packs.append(range(start, len(lengths)))
    return packs


def _budget(left: int, tokens_per_pack: int, at_once: int) -> int:
    """Return the most tokens of the next pack: half of an equal share, once that is less."""
    if at_once == 1:
        return tokens_per_pack
    return min(tokens_per_pack, max(_LEAST_TOKENS, left // (2 * at_once)))


def remaining(pack: range, done: Sequence[range]) -> Iterator[range]:
    """Yield the parts of `pack` that no range of `done` (ascending, disjoint) covers.

    If pack sizes have not changed since `done` was written, a pack remains whole or not at all, so
    a resumed run ends with the same bits as one that was never stopped.
    """
    start = pack.start
    for stretch in done:
        if stretch.stop <= start:
            continue
        if stretch.start >= pack.stop:
            break
        if stretch.start > start:
            yield range(start, stretch.start)
        start = stretch.stop
    if start < pack.stop:
        yield range(start, pack.stop)
