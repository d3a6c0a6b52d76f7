"""The cluster's benchmark: if this fails, its figures are of another run, or there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster
from benchmarks.sleeping import SleepingActor
from benchmarks.workload import sequences
from lib.catalog import RELEASED
from lib.jobs.actor import Actor
from schema.esm2_config import ModelShape
from tests.in_process_ray import InProcessRay, installed

SMALL = ModelShape(2, 64, 4, token_dropout=True)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InProcessRay:
    """Ray and the fresh processes in this one, small models, and few sequences."""

    def in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        return function(*arguments)

    monkeypatch.setattr(cluster, "in_process", in_process)
    monkeypatch.setattr(cluster, "sequences", lambda mix, count: sequences(mix, min(count, 60)))
    small = {name: replace(one, shape=SMALL) for name, one in RELEASED.items()}
    monkeypatch.setattr(cluster, "RELEASED", small)
    return installed(monkeypatch)


def test_every_figure_is_taken(
    ray: InProcessRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "cluster.json"
    few = ["--repeats", "1", "--workers", "2", "--records", "60", "--seconds", "0.3"]
    assert cluster.main([*few, "--to", str(to)]) == 0
    found = json.loads(to.read_text())
    assert list(found) == ["overhead", "memory", "driver", "simulation"]
    for one in found["overhead"].values():
        assert one["stretches"] > 2
        (ratio,) = one["ratios"]
        assert ratio > 0
    for one in found["memory"].values():
        assert one["peak_bytes"] >= one["before_bytes"] > 0
        assert one["checkpoints"] > 2
    driver = found["driver"]
    assert min(value for name, value in driver.items() if name.endswith("per record")) > 0
    assert driver["mean"]["gpus"] > driver["mean bos"]["gpus"] > driver["contacts"]["gpus"] > 0
    simulated = found["simulation"]
    assert simulated["checkpoints"] > 2
    assert simulated["seconds"] >= simulated["best_s"] == 0.3
    assert simulated["of_linear"] == pytest.approx(0.3 / simulated["seconds"])
    printed = capsys.readouterr().out
    assert f"2 workers, 60 records, {simulated['checkpoints']} stretches: " in printed
    # Two workers for each cluster run: the last two have slept, the others have computed.
    made = [type(one.made) for one in ray.actors]
    assert made == [Actor] * 8 + [SleepingActor] * 2
