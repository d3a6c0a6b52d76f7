"""The estimate: if this fails, a run takes a week or a disk that nobody was told of before.

No test compares wall-clock times: the clock is given, and moves when packs are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.errors import MachineError
from lib.jobs import estimate as estimates
from lib.jobs.estimate import disk_bytes, estimate_run, timed_trial
from lib.jobs.loading import LoadedModel, load_model
from lib.jobs.progress import computing_cost
from lib.jobs.reuse import SEARCH_BYTES
from lib.models.detection import detect
from lib.sequences.inventory import Inventory, preflight
from lib.settings import load_settings
from lib.units import size
from tests.conftest import ROOT, SOME_PROTEINS, UNIPROT_PART, Place, Script

WIDTH = 64


@pytest.fixture
def model(place: Place, small_model: Path) -> LoadedModel:
    said: dict[str, str | list[str]] = {
        "model.esm_model": str(small_model),
        "input.fasta": [str(SOME_PROTEINS)],
        "compute.device": "cpu",
    }
    settings = load_settings(place.config, said)
    return load_model(settings, detect(settings.model))


@pytest.fixture
def inventory(model: LoadedModel) -> Inventory:
    return preflight(model.settings.input)


class Machine:
    """Computes packs in so many seconds per unit of cost, on a clock of its own."""

    def __init__(self, seconds_per_cost: float, warming: float = 0.0) -> None:
        self.now = 100.0
        self.packs: list[list[int]] = []
        self._seconds_per_cost, self._warming = seconds_per_cost, warming

    def clock(self) -> float:
        return self.now

    def compute(self, packs: Sequence[Sequence[int]]) -> None:
        self.packs += [list(pack) for pack in packs]
        cost = sum(computing_cost(np.array(pack), WIDTH) for pack in packs)
        self.now += self._warming + self._seconds_per_cost * cost
        self._warming = 0.0


def test_the_time_is_what_all_costs_at_the_speed_of_the_trial(
    model: LoadedModel, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(3e-8, warming=50.0)  # what warms up first does not count

    def compute(_needs: object, packs: Sequence[Sequence[int]]) -> None:
        machine.compute(packs)

    monkeypatch.setattr(estimates._Needs, "compute", compute)
    found = estimate_run(model, inventory, machine.clock)
    assert found.seconds == pytest.approx(3e-8 * computing_cost(inventory.lengths, WIDTH))
    assert (found.records, found.residues, found.device) == (15, inventory.residues, "cpu")
    assert found.trial.seconds == pytest.approx(3e-8 * found.trial.cost)
    assert found.disk == disk_bytes(inventory, model.settings, model.config, found.seconds)


def test_a_trial_has_long_and_short_packs_of_the_real_size(model: LoadedModel) -> None:
    lengths = np.arange(20, 1_020, dtype=np.int32)
    machine = Machine(1e-9)
    trial = timed_trial(lengths, model, machine.compute, machine.clock)
    small, packs = machine.packs[:4], machine.packs[4:]
    assert small == [[254]] * 4
    assert trial.packs == len(packs) == 8
    assert trial.residues == sum(map(sum, packs))
    assert all(1_000 < sum(pack) + 2 * len(pack) <= 2_048 for pack in packs)
    assert max(map(max, packs)) > 900
    assert min(map(min, packs)) < 600
    # Records in the file come in any order.
    shuffled = np.random.default_rng(1).permutation(lengths)
    assert timed_trial(shuffled, model, machine.compute, machine.clock).packs == 8


def test_a_trial_is_short_whatever_the_speed(model: LoadedModel) -> None:
    lengths = np.full(5_000, 500, np.int32)
    spent = {}
    for seconds in (1e-9, 1e-7, 1e-6, 1e-4):
        machine = Machine(seconds)
        trial = timed_trial(lengths, model, machine.compute, machine.clock)
        spent[seconds] = len(machine.packs)
        assert trial.seconds / trial.cost == pytest.approx(seconds)
        assert machine.now - 100.0 <= 15 + 2 * seconds * computing_cost(np.array([254] * 2), WIDTH)
    assert spent[1e-9] == 12
    assert spent[1e-6] < 12  # enough after some
    assert spent[1e-4] == 4  # the small ones alone


def test_packs_that_memory_does_not_hold_are_left_out(model: LoadedModel) -> None:
    machine = Machine(1e-9)

    def compute(packs: Sequence[Sequence[int]]) -> None:
        if max(map(max, packs)) > 254:
            raise MachineError("record 0 (trial): no memory")
        machine.compute(packs)

    trial = timed_trial(np.array([3_000], np.int32), model, compute, machine.clock)
    assert (trial.packs, trial.residues) == (2, 508)


@pytest.mark.parametrize(
    ("include", "dtype"),
    [("mean bos", "float32"), ("per_tok", "float32"), ("mean per_tok contacts", "float16")],
)
def test_the_bytes_are_those_of_a_real_runs_files(
    script: Script, place: Place, small_model: Path, include: str, dtype: str
) -> None:
    place.set("output", "include", include)
    place.set("output", "per_tok_dtype", dtype)
    flags = ["--esm-model", small_model, "--input", UNIPROT_PART, "--repr-layers", "0", "2"]
    flags += ["--set", "input.max_residues=200"]
    said = script("validate", *flags, "--json").json["estimate"]
    assert script("embed", *flags).status == 0
    files = [*place.output.glob("run-000001/*.parquet")]
    taken = sum(path.stat().st_size for path in files)
    assert said["disk"] == pytest.approx(taken, rel=0.05)


def test_each_file_and_each_header_takes_its_part(model: LoadedModel, inventory: Inventory) -> None:
    whole = disk_bytes(inventory, model.settings, model.config)
    longer = replace(inventory, header_letters=inventory.header_letters + 4_000)
    assert disk_bytes(longer, model.settings, model.config) == whole + 1_000
    assert disk_bytes(inventory, model.settings, model.config, 600.0) > whole + 9 * 4_000


def test_the_memory_grows_with_the_longest_sequence(
    model: LoadedModel, inventory: Inventory
) -> None:
    found = estimate_run(model, inventory)
    assert found.memory > 400_000_000
    assert found.gpu_memory is None
    assert found.disk_free > 0
    needs = estimates._Needs(model)
    assert needs.of_largest(60_000) > needs.of_largest(1_000) > 0
    needs.compute([[30, 20], [254]])
    small = needs.tried
    needs.compute([[1_000], [900]])
    needs.compute([[30]])
    assert needs.tried > small > 0


def test_the_memory_of_a_gpu_is_that_of_the_device_that_computes(
    model: LoadedModel, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {second: 7_000_000_000}.__getitem__)
    monkeypatch.setattr(estimates._Needs, "compute", lambda *_: None)
    model.network.device = second
    found = estimate_run(model, inventory, iter(range(1_000)).__next__)
    assert found.gpu_memory is not None
    assert 7_000_000_000 < found.gpu_memory < 8_000_000_000


def test_the_page_has_the_figures_of_the_estimate() -> None:
    page = " ".join((ROOT / "docs" / "how-long-and-how-big.md").read_text().split())
    assert f"{size(estimates._HELD_BYTES)} of rows that wait for their file" in page
    assert f"{SEARCH_BYTES} bytes for each different sequence" in page


def test_validate_says_what_a_run_would_take(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    for name, more in (("validate", []), ("embed", ["--validate-config"])):
        text = script(name, *flags, *more).out
        start = text.index("estimate for 15 records, ")
        head, time, disk, memory, *_ = text[start:].splitlines()
        assert head.endswith(" residues to embed:")
        assert " on cpu (tried: " in time
        assert disk.startswith("  disk    ")
        assert disk.endswith(" free)")
        assert memory.startswith("  memory  up to ")
    assert script("validate", "--esm-model", small_model, "--json").json["estimate"] is None
    assert not place.output.exists()
    assert not place.database.exists()
