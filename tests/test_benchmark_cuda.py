"""make benchmark-cuda: if this fails, the minutes that somebody has a GPU for are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cuda
from benchmarks.contenders import Embed, ours
from benchmarks.cuda import CONTENDERS, FAIR_ESM, PARTS, RUNS, Case, Measurement, main, table_rows
from lib.console.program import guarded
from lib.errors import SettingsError
from lib.models.detection import Detection
from lib.network.elementwise import PLAIN
from schema.esm2_config import ModelShape
from tests.conftest import Place

CPU = torch.device("cpu")
TINY = Case("tiny", ModelShape(1, 32, 2, True), 11)  # of which fair-esm has two
FLASH = ["transformers FlashAttention float16", "transformers FlashAttention bfloat16"]


def test_without_a_gpu_it_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert guarded(main, ["--to", str(tmp_path)]) == 4
    captured = capsys.readouterr()
    assert captured.err == "error: device cuda: torch sees 0 CUDA devices\n"
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_the_parts_are_listed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        ["1", "8M"], ["1", "35M"], ["1", "150M"], ["2", "650M"], ["3", "3B"]
    ]  # fmt: skip
    assert PARTS[3][0].shape.hidden_dim == 2560


@pytest.fixture
def measurement(place: Place, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """The measurement of a GPU, on a CPU: nothing is compiled, and one peer has no memory."""

    def broken(_found: Detection, _device: torch.device, dtype: torch.dtype, *_: str) -> Embed:
        raise RuntimeError(f"out of memory\nfor {dtype}")

    monkeypatch.setattr(cuda, "compiled", lambda: PLAIN)
    monkeypatch.setattr("lib.jobs.loading.compiled", lambda: PLAIN)
    monkeypatch.setattr(cuda, "transformers_sdpa", broken)
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    monkeypatch.setattr(cuda, "roof", lambda *_: 1e12)
    monkeypatch.setattr("benchmarks.cuda.time.monotonic", lambda: 0)
    return Measurement(CPU, place.config, place.folder, 1, until=1)


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(place: Place) -> None:
    with pytest.raises(SettingsError, match=r"^--to \S+/nowhere: no such folder$"):
        Measurement(CPU, place.config, place.folder / "nowhere", 1, until=1)


def test_every_figure_is_written_and_none_is_measured_twice(
    measurement: Measurement, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measurement.measure(TINY)
    found = json.loads(measurement.path.read_text())["cases"]["tiny"]
    assert found["records"] == 11
    figures = found["contenders"]
    assert list(figures) == [*CONTENDERS, *RUNS]
    for name, one in figures.items():
        if name in FLASH:
            assert one == {"missing": "no package flash_attn"}
        elif name.startswith("transformers"):
            assert one == {"failed": f"RuntimeError: out of memory for torch.{name.split()[-1]}"}
        else:
            assert one["tokens_per_second"] > 0, name
        assert name in RUNS or one.get("agrees", True), name
        # Means of untrained weights are alike: the cosine alone would not see two of them swapped.
        assert one.get("error", 0.0) <= 5e-3, name
    assert {name for name, one in figures.items() if "agrees" in one} == {
        name for name in CONTENDERS if name.startswith("esm-ledger") or name == FAIR_ESM
    } - {FAIR_ESM}

    made: list[str] = []

    def peer(found: Detection, device: torch.device, dtype: torch.dtype, *_: str) -> Embed:
        made.append(str(dtype))
        return ours(found, device, dtype, 500)

    monkeypatch.setattr(cuda, "transformers_sdpa", peer)
    again = Measurement(CPU, place.config, place.folder, 1, until=1)
    assert again.measure(TINY)
    assert made == ["torch.float16", "torch.bfloat16"]
    monkeypatch.setattr(cuda, "make_model", None)
    assert Measurement(CPU, place.config, place.folder, 1, until=1).measure(TINY)


def test_a_part_ends_in_time_and_says_that_something_is_left(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0, 0, 0, 2])
    monkeypatch.setattr("benchmarks.cuda.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(cuda, "fair_esm", lambda *_: lambda some: np.ones((len(some), 32)))
    assert not measurement.measure(TINY)
    found = json.loads(measurement.path.read_text())["cases"]["tiny"]["contenders"]
    assert list(found) == [FAIR_ESM, "transformers float16"]


def test_no_ratio_stands_where_a_side_failed_or_disagrees() -> None:
    def side(**more: object) -> dict[str, Any]:
        return {"seconds": [1.0, 1.1], "tokens_per_second": 6.0, "peak_gb": 2.0, **more}

    contenders = {
        FAIR_ESM: side(tokens_per_second=2.0),
        "transformers float16": side(tokens_per_second=3.0, agrees=True),
        "transformers FlashAttention float16": {"missing": "no package flash_attn"},
        "transformers bfloat16": {"failed": "RuntimeError: x"},
        "esm-ledger float16": side(agrees=True, share_of_roof=0.7),
        "esm-ledger compiled float16": side(agrees=False),
        "esm-ledger bfloat16": side(agrees=True),
    }
    rows = table_rows({"cases": {"650M": {"contenders": contenders}}})
    by_name = {row[1]: row for row in rows}
    assert by_name["esm-ledger float16"][3:7] == ["10 %", 0.7, 3.0, 2.0]
    assert by_name["esm-ledger compiled float16"][5:7] == [None, None]
    assert by_name["esm-ledger bfloat16"][5:7] == [3.0, None]
    assert by_name["transformers bfloat16"][2] == "RuntimeError: x"
    assert by_name["transformers FlashAttention float16"][2] == "no package flash_attn"


def test_what_was_not_compared_is_left() -> None:
    """The truth may have failed when the others were measured."""
    known: dict[str, dict[str, object]]
    known = {"esm-ledger float16": {"seconds": [1.0]}, FAIR_ESM: {"seconds": [1.0]}}
    assert cuda._is_left("esm-ledger float16", known)
    assert not cuda._is_left(FAIR_ESM, known)
    known["esm-ledger float16"] = {"seconds": [1.0], "agrees": False}
    assert not cuda._is_left("esm-ledger float16", known)
