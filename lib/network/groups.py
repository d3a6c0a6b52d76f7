"""Groups: neighbours of equal length in a pack, which one operation can compute together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Group", "group_equal_lengths"]


@dataclass(frozen=True)
class Group:
    """`count` sequences of `tokens` tokens each, end to end from token `start` of a pack."""

    start: int
    count: int
    tokens: int

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.count * self.tokens


def group_equal_lengths(lengths: Sequence[int]) -> list[Group]:
    """Return the groups of a pack in order; lengths: (N,) residues per sequence."""
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
