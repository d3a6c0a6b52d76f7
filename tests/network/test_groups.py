"""Groups of a pack: if these fail, a sequence is computed as part of its neighbour."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from lib.network.groups import Group, group_equal_lengths

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_groups_hold_every_sequence_at_its_place(lengths: list[int]) -> None:
    groups = group_equal_lengths(lengths)
    assert [group.tokens - 2 for group in groups for _ in range(group.count)] == lengths
    place = 0
    for group in groups:
        assert group.start == place
        place = group.stop
    assert place == sum(lengths) + 2 * len(lengths)
    for group, following in itertools.pairwise(groups):
        assert group.tokens != following.tokens


def test_neighbours_of_one_length_are_one_group() -> None:
    groups = [Group(0, 2, 5), Group(10, 1, 4), Group(14, 1, 5)]
    assert group_equal_lengths([3, 3, 2, 3]) == groups
