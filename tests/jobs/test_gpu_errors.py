"""A GPU that fails or cannot be used: if this fails, it costs finished work or prints a traceback.

There need not be one: what torch raises and says is given.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib.errors import MachineError
from lib.jobs import loading
from lib.ledger.history import query
from lib.network import device
from lib.network.device import choose_device
from lib.network.esm2 import Network
from lib.network.memory import device_errors
from lib.network.vectors import Launched
from lib.settings import load_settings
from tests.conftest import SOME_PROTEINS, Place, Script

NO_KERNEL = torch.AcceleratorError(
    "CUDA error: no kernel image is available for execution on the device\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has …")
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). "
    "Please update your GPU driver"
)


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (NO_KERNEL, r"^cpu: CUDA error: no kernel image is available for execution on the device$"),
        (FULL, r": out of memory for \d+ parameters on cpu$"),
    ],
)
@pytest.mark.parametrize("name", ["embed", "validate"])
def test_what_a_gpu_says_at_its_first_use_is_one_line(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    fact: str,
) -> None:
    def raises(_: torch.device) -> None:
        raise error

    monkeypatch.setattr(loading, "refuse_rounding", raises)
    answer = script(name, "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 4
    assert re.search(fact, answer.error)


def test_what_a_gpu_says_of_the_first_sequence_is_one_line(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object) -> object:
        raise NO_KERNEL

    monkeypatch.setattr(Network, "forward", raises)
    answer = script("validate", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert (answer.status, answer.error) == (4, "cpu: " + str(NO_KERNEL).partition("\n")[0])


def test_what_was_computed_before_a_gpu_failed_is_committed(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, collected = Launched.collect, list[Launched]()

    def collect(self: Launched) -> object:
        if len(collected) == 9:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        collected.append(self)
        return true(self)

    monkeypatch.setattr(Launched, "collect", collect)
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    answer = script("embed", *flags, "--set", "compute.tokens_per_pack=10")
    assert (answer.status, answer.error) == (
        4,
        "cpu: CUDA error: uncorrectable ECC error encountered",
    )
    done = query(str(place.database), "SELECT status, records_done FROM run_history").rows
    assert done == [("failed", 9)]


def test_other_errors_are_not_taken_for_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="shapes"), device_errors(torch.device("cuda")):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(torch.OutOfMemoryError), device_errors(torch.device("cuda")):
        raise FULL


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def is_available() -> bool:
        warnings.warn(OLD_DRIVER, stacklevel=1)
        return False

    device._complaint.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    device._complaint()  # as torch says it once only
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    device._complaint.cache_clear()


def test_a_driver_that_is_too_old_is_told(old_driver: None) -> None:
    fact = (
        "; CUDA initialization: The NVIDIA driver on your system is too old (found version 12040)."
    )
    compute = load_settings().compute
    assert choose_device(compute) == (torch.device("cpu"), f"auto: no CUDA device{fact}")
    chosen = load_settings(overrides={"compute.device": "cuda"}).compute
    with pytest.raises(MachineError) as refused:
        choose_device(chosen)
    assert str(refused.value) == f"device cuda: torch sees 0 CUDA devices{fact}"
