"""Packs: if these fail, a user's sequences go missing or overflow memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.sequences.plan import packs_left, plan_packs, remaining
from lib.sequences.windows import Sequence as FastaSequence
from lib.sequences.windows import Window

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


# ---- Packs of windows


def windows_of(*lengths: list[int]) -> list[Window]:
    """Return windows of sequences with so many residues, at consecutive positions."""
    windows, position = [], 0
    for window in lengths:
        sequences = [FastaSequence(b"M" * residues, []) for residues in window]
        windows.append(Window(position, sequences))
        position += len(sequences)
    return windows


def test_packs_stand_at_their_positions_and_say_where_their_window_ends() -> None:
    windows = windows_of([8, 8, 3], [], [8], [3, 3])
    packs = list(packs_left(windows, 20, 1, []))
    assert [(pack.positions, pack.ends_window) for pack in packs] == [
        (range(0, 2), False),
        (range(2, 3), True),
        (range(3, 4), True),
        (range(4, 6), True),
    ]
    assert [pack.sequences for pack in packs] == [
        windows[0].sequences[:2],
        windows[0].sequences[2:],
        windows[2].sequences,
        windows[3].sequences,
    ]


def test_a_pack_that_is_left_keeps_its_bounds_and_only_a_last_one_ends_its_window() -> None:
    windows = windows_of([8, 8, 8, 8, 8, 8], [8, 8], [8])
    done = [range(2, 4), range(6, 9)]
    packs = list(packs_left(windows, 20, 1, done))
    assert [(pack.positions, pack.ends_window) for pack in packs] == [
        (range(0, 2), False),
        (range(4, 6), True),
    ]
    packs = list(packs_left(windows, 20, 1, [range(4, 8)]))
    assert [(pack.positions, pack.ends_window) for pack in packs] == [
        (range(0, 2), False),
        (range(2, 4), False),
        (range(8, 9), True),
    ]


def test_packs_of_another_size_leave_out_what_is_done() -> None:
    packs = list(packs_left(windows_of([8, 8, 8, 8]), 30, 1, [range(1, 2)]))
    assert [(pack.positions, pack.ends_window) for pack in packs] == [
        (range(0, 1), False),
        (range(2, 3), False),
        (range(3, 4), True),
    ]


def test_windows_are_read_one_at_a_time() -> None:
    read = []

    def windows() -> Iterator[Window]:
        for window in windows_of([8, 8, 8], [8], [8]):
            read.append(window.first_position)
            yield window

    packs = packs_left(windows(), 20, 1, [range(3, 4)])
    assert next(packs).positions == range(0, 2)
    assert read == [0]
    next(packs)
    assert read == [0]
    assert next(packs).positions == range(4, 5)
    assert read == [0, 3, 4]


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), max_size=20), max_size=5),
    budget=st.integers(3, 2000),
    at_once=st.integers(1, 3),
    done=st.sets(st.integers(0, 100)),
)
def test_what_is_done_and_what_is_left_are_the_whole_plan(
    lengths: list[list[int]], budget: int, at_once: int, done: set[int]
) -> None:
    windows = windows_of(*lengths)
    planned = list(packs_left(windows, budget, at_once, []))
    assert sum(pack.ends_window for pack in planned) == sum(map(bool, lengths))
    left = list(packs_left(windows, budget, at_once, [range(i, i + 1) for i in sorted(done)]))
    sequences = [sequence for window in windows for sequence in window.sequences]
    positions = [i for pack in left for i in pack.positions]
    assert positions == [i for i in range(len(sequences)) if i not in done]
    ends = {window.first_position + len(window.sequences) for window in windows}
    for pack in left:
        assert list(pack.sequences) == sequences[pack.positions.start : pack.positions.stop]
        assert pack.ends_window == (pack.positions.stop in ends)
        assert any(set(pack.positions) <= set(whole.positions) for whole in planned)


@settings(deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 60), max_size=20), max_size=5), data=st.data())
def test_packs_do_not_change_with_the_place_of_an_interruption(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    windows = windows_of(*lengths)
    planned = list(packs_left(windows, 300, 2, []))
    committed = [data.draw(st.booleans()) for _ in planned]
    done = [pack.positions for pack, is_done in zip(planned, committed, strict=True) if is_done]
    expected = [pack for pack, is_done in zip(planned, committed, strict=True) if not is_done]
    assert list(packs_left(windows, 300, 2, done)) == expected
