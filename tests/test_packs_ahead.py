"""Packs ahead: if this fails, a GPU's vectors stand at other proteins, or finished ones are lost.

On a GPU a pack is launched before the one before it is collected. Here the same is tried on a CPU.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib import embedding, pooling, vectors
from lib.errors import MachineError
from lib.packing import Group
from lib.vectors import Launched, Vectors
from tests.conftest import SOME_PROTEINS, Answer, Place, Script
from tests.reference import fasta, read_run

Step = Callable[[str], None]


class Steps:
    """What was launched and collected, in order; `before(step)` may do harm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.before: Step = lambda step: None
        launch, collect = vectors.launch, Launched.collect

        def launched(*arguments: Any) -> Launched:  # noqa: ANN401 (handed on as it came)
            self._step("launch")
            return launch(*arguments)

        def collected(pack: Launched) -> Vectors:
            self._step("collect")
            return collect(pack)

        monkeypatch.setattr(embedding, "launch", launched)
        monkeypatch.setattr(Launched, "collect", collected)

    def _step(self, kind: str) -> None:
        step = f"{kind} {1 + sum(one.startswith(kind) for one in self.seen)}"
        self.before(step)
        self.seen.append(step)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """One pack ahead, as on CUDA."""
    monkeypatch.setitem(embedding._PACKS_AHEAD, "cpu", 1)
    return Steps(monkeypatch)


def embed(script: Script, model: Path) -> Answer:
    # Every protein is a pack of its own.
    flags = ["--set", "compute.tokens_per_pack=10", "--include", "mean", "per_tok"]
    return script("embed", "--esm-model", model, "--input", SOME_PROTEINS, *flags)


def longest() -> list[str]:
    """Return the ids, longest sequence first: the order of the plan."""
    return [
        header.split()[0] for header, _ in sorted(fasta(SOME_PROTEINS), key=lambda e: -len(e[1]))
    ]


def test_vectors_are_those_of_one_pack_at_a_time(
    script: Script, place: Place, small_model: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    assert steps.seen[:5] == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2"]
    assert steps.seen[-2:] == ["collect 14", "collect 15"]
    monkeypatch.setitem(embedding._PACKS_AHEAD, "cpu", 0)
    steps.seen.clear()
    assert embed(script, small_model).status == 0
    assert steps.seen[:4] == ["launch 1", "collect 1", "launch 2", "collect 2"]
    one, other = (read_run(place.output / f"run-00000{run}") for run in (1, 2))
    assert len(one) == 15
    np.testing.assert_equal(one, other)


def records_done(script: Script) -> int:
    (run,) = script("history", "--json").json
    return int(run["records_done"])


def test_a_signal_commits_what_was_launched(
    script: Script, place: Place, small_model: Path, steps: Steps
) -> None:
    def signalled(step: str) -> None:
        if step == "launch 4":
            os.kill(os.getpid(), signal.SIGTERM)

    steps.before = signalled
    assert embed(script, small_model).status == 143
    assert records_done(script) == 4
    steps.before = lambda step: None
    assert script("resume", "--run", "1").status == 0
    assert len(read_run(place.output / "run-000001")) == 15


def test_a_pack_that_cannot_be_launched_does_not_take_the_one_before_it(
    script: Script, small_model: Path, steps: Steps
) -> None:
    def failing(step: str) -> None:
        if step == "launch 4":
            raise MachineError("no memory")

    steps.before = failing
    answer = embed(script, small_model)
    assert (answer.status, answer.error) == (4, "no memory")
    assert records_done(script) == 3


def test_a_pack_that_is_not_finite_does_not_take_the_one_before_it(
    script: Script, small_model: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = pooling.mean

    def spoiled(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        third = steps.seen[-1] == "launch 3"
        return true(hidden, groups) * (torch.nan if third else 1)

    monkeypatch.setattr(pooling, "mean", spoiled)
    answer = embed(script, small_model)
    assert answer.status == 2
    assert f"({longest()[2]}): non-finite value in mean of layer 2" in answer.error
    assert records_done(script) == 2
