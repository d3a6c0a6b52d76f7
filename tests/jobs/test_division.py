"""Division: if this fails, workers idle, wait for one of them at the end, or fill the memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lib.jobs.division import Division, SizeRules, Stretch
from lib.jobs.progress import computing_cost
from lib.sequences.plan import Pack, packs_left
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence as FastaSequence
from lib.sequences.windows import Window
from schema.parquet import vector_columns

WIDTH = 64


def cost_of(lengths: Sequence[int]) -> float:
    return computing_cost(np.asarray(lengths), WIDTH)


def packs(lengths: Sequence[int], *, window: int = 100, done: Sequence[range] = ()) -> list[Pack]:
    """Return the packs of sequences of such lengths, in windows of so many."""
    windows = []
    for first in range(0, len(lengths), window):
        part = sorted(lengths[first : first + window], reverse=True)
        sequences = [
            FastaSequence(b"A" * length, [Owner(first + i, str(i), "", length, "")])
            for i, length in enumerate(part)
        ]
        windows.append(Window(first, sequences))
    return list(packs_left(windows, 1000, 2, done))


def division(
    some: Sequence[Pack], *, include: Sequence[str] = ("mean",), **rules: float
) -> Division:
    bounds = {"seconds": 60.0, "records": 20_000, "width": WIDTH, **rules}
    sizes = SizeRules(
        bounds["seconds"], int(bounds["records"]), 2, vector_columns(include, [2]),
        int(bounds["width"]),
    )  # fmt: skip
    cost = sum(cost_of([len(one.residues) for one in pack.sequences]) for pack in some)
    return Division(some, sizes, cost_of, cost)


def cut(made: Division, rate: float | None, workers: int) -> list[Stretch]:
    found = []
    while (stretch := made.next(rate, workers)) is not None:
        found.append(stretch)
    return found


@pytest.mark.parametrize("rate", [None, 1e3, 1e9])
@pytest.mark.parametrize("done", [[], [range(30, 41), range(150, 160), range(195, 220)]])
def test_every_pack_is_in_one_stretch_and_no_stretch_leaves_its_window(
    rate: float | None, done: list[range]
) -> None:
    some = packs(np.random.default_rng(0).integers(20, 600, 350).tolist(), done=done)
    stretches = cut(division(some), rate, 3)
    assert [pack for stretch in stretches for pack in stretch.packs] == some
    for stretch in stretches:
        positions = [place for pack in stretch.packs for place in pack.positions]
        assert positions == list(stretch.positions)
        assert positions[0] // 100 == positions[-1] // 100
        assert stretch.records == len(stretch.lengths) == len(positions)


def test_of_an_unknown_worker_little_is_asked_then_what_it_does_in_three_quarters_of_the_time() -> (
    None
):
    some = packs([300] * 20_000, window=20_000)
    made = division(some, seconds=40)
    first = made.next(None, 2)
    assert first is not None
    assert len(first.packs) == 2
    rate = cost_of([300] * 20)
    second = made.next(rate, 2)
    assert second is not None
    assert second.cost == pytest.approx(30 * rate, rel=0.02)


def test_every_worker_gets_eight_stretches_which_shrink_towards_the_end() -> None:
    some = packs([300] * 20_000, window=20_000)
    total = cost_of([300] * 20_000)
    costs = [stretch.cost for stretch in cut(division(some), total / 1000, 4)]
    assert len(costs) >= 32
    assert max(costs) <= total / 32
    # Until they take a second, which is 1/1000 of all here, each is half of a worker's share of
    # what is left.
    long = [cost for cost in costs if cost > total / 500]
    assert long == sorted(long, reverse=True)
    assert sum(cost < costs[0] / 2 for cost in long) > 8
    assert costs[-1] <= total / 1000


def test_a_short_run_is_not_cut_into_crumbs() -> None:
    some = packs([300] * 2_000, window=2_000)
    total = cost_of([300] * 2_000)
    stretches = cut(division(some), total / 10, 8)
    assert len(stretches) <= 12  # of a second each, but for the last


def test_a_stretch_holds_so_many_records_and_bytes_and_no_more() -> None:
    some = packs([300] * 2_000, window=2_000)
    for stretch in cut(division(some, records=100), 1e12, 1)[:-1]:
        assert 100 <= stretch.records < 103
    made = division(packs([300] * 5_000, window=5_000), include=["per_tok"], width=1280)
    for stretch in cut(made, 1e12, 1):
        assert sum(4 * 1280 * length for length in stretch.lengths) <= 256 << 20


def test_a_stretch_in_two_parts_is_the_whole() -> None:
    stretch = cut(division(packs([300] * 30)), 1e12, 1)[0]
    head, rest = stretch.first(2), stretch.without(2)
    assert [*head.packs, *rest.packs] == list(stretch.packs)
    assert head.cost + rest.cost == pytest.approx(stretch.cost)
