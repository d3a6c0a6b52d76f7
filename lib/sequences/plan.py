"""Packing: which sequences go through the network together, end to end, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Group", "group_equal_lengths", "plan_packs", "remaining"]

# Smaller packs are slower: what is done once a pack shows.
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class Group:
    """A run of `count` sequences of `tokens` tokens each that starts at token `start` of a pack."""

    start: int
    count: int
    tokens: int

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.count * self.tokens


def plan_packs(lengths: Sequence[int], tokens_per_pack: int, at_once: int = 1) -> list[range]:
    """Cut a run of sequences into packs of at most `tokens_per_pack` tokens.

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
    """Return the most tokens of the next pack: half an equal share, once that is less."""
    if at_once == 1:
        return tokens_per_pack
    return min(tokens_per_pack, max(_LEAST_TOKENS, left // (2 * at_once)))


def remaining(pack: range, done: Sequence[range]) -> Iterator[range]:
    """Yield the parts of `pack` that no range of `done` (ascending, disjoint) covers.

    When pack sizes have not changed since `done` was written, that is the whole pack or
    nothing, so that a resumed run ends with the same bits as one that was never stopped.
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


def group_equal_lengths(lengths: Sequence[int]) -> list[Group]:
    """Return the runs of neighbours with equal length; lengths: (N,) residues per sequence."""
    groups: list[Group] = []
    start = 0
    for residues in lengths:
        tokens = residues + 2
        if groups and groups[-1].tokens == tokens:
            groups[-1] = Group(groups[-1].start, groups[-1].count + 1, tokens)
        else:
            groups.append(Group(start, 1, tokens))
        start += tokens
    return groups
