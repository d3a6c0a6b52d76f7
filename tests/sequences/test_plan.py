"""Packs: if these fail, a user's sequences go missing or overflow memory."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.sequences.plan import plan_packs, remaining

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(3, 100))
def test_packs_cover_everything_once_in_order(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    assert [i for pack in packs for i in pack] == list(range(len(lengths)))
    assert all(packs)


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(3, 100))
def test_only_a_single_sequence_exceeds_the_budget(lengths: list[int], budget: int) -> None:
    for pack in plan_packs(lengths, budget):
        tokens = sum(lengths[i] + 2 for i in pack)
        assert tokens <= budget or len(pack) == 1


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(3, 100))
def test_a_pack_ends_only_where_the_next_sequence_does_not_fit(
    lengths: list[int], budget: int
) -> None:
    packs = plan_packs(lengths, budget)
    for pack, following in itertools.pairwise(packs):
        assert sum(lengths[i] + 2 for i in pack) + lengths[following.start] + 2 > budget


@pytest.mark.parametrize(
    ("lengths", "budget", "packs"),
    [
        ([], 10, []),
        ([3, 3], 10, [range(0, 2)]),
        ([3, 3], 9, [range(0, 1), range(1, 2)]),
        ([50, 3, 3, 3], 10, [range(0, 1), range(1, 3), range(3, 4)]),
        ([3, 50, 3], 10, [range(0, 1), range(1, 2), range(2, 3)]),
    ],
)
def test_cls_and_eos_count_towards_the_budget(
    lengths: list[int], budget: int, packs: list[range]
) -> None:
    assert plan_packs(lengths, budget) == packs


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200).map(
        lambda drawn: sorted(drawn, reverse=True)
    )
)
def test_packs_computed_at_once_end_together(lengths: list[int]) -> None:
    packs = plan_packs(lengths, 2048, at_once=2)
    assert [i for pack in packs for i in pack] == list(range(len(lengths)))
    sizes = [sum(lengths[i] + 2 for i in pack) for pack in packs]
    assert max(sizes) <= 2048
    # Two computers take the next pack when they are ready; none works alone for long.
    busy = [0, 0]
    for size in sizes:
        busy[busy.index(min(busy))] += size
    assert max(busy) - min(busy) <= 512


def test_the_last_packs_shrink_only_where_several_are_computed_at_once() -> None:
    lengths = [98] * 80
    assert [len(pack) for pack in plan_packs(lengths, 2048)] == [20, 20, 20, 20]
    at_once = [len(pack) for pack in plan_packs(lengths, 2048, at_once=2)]
    assert at_once == [20, 15, 11, 8, 6, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("done", "parts"),
    [
        ([], [range(10, 20)]),
        ([range(0, 10)], [range(10, 20)]),
        ([range(20, 30)], [range(10, 20)]),
        ([range(10, 20)], []),
        ([range(0, 30)], []),
        ([range(0, 12)], [range(12, 20)]),
        ([range(18, 30)], [range(10, 18)]),
        ([range(12, 14), range(16, 17)], [range(10, 12), range(14, 16), range(17, 20)]),
        ([range(0, 15), range(15, 30)], []),
    ],
)
def test_what_is_done_is_left_out(done: list[range], parts: list[range]) -> None:
    assert list(remaining(range(10, 20), done)) == parts


@settings(deadline=None)
@given(pack=st.tuples(st.integers(0, 30), st.integers(1, 20)), done=st.sets(st.integers(0, 60)))
def test_what_remains_is_the_pack_without_what_is_done(
    pack: tuple[int, int], done: set[int]
) -> None:
    whole = range(pack[0], sum(pack))
    stretches = [range(i, i + 1) for i in sorted(done)]
    parts = list(remaining(whole, stretches))
    assert [i for part in parts for i in part] == [i for i in whole if i not in done]
    assert all(parts)
