"""Loading: if this fails, a model that fits in memory no longer does, or a broken one is used."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.loading import measure, program
from lib.errors import MachineError
from lib.jobs import loading
from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.network import linear
from lib.network.esm2 import load_network
from lib.network.linear import Affine
from lib.settings import load_settings
from schema.esm2_config import ModelShape
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script
from tests.processes import run_program


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_peak_memory_is_the_model_and_little_more(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "esm2_large.pt"
    make_model(path, 3, 1024, 16, dtype=dtype)
    in_memory = 4 * ModelShape(3, 1024, 16, True).parameters
    done = run_program(program("esm-ledger, digest taken"), path)
    took = json.loads(done.out)
    # With the largest layer as it is in the file; a second copy of the model breaks the bound.
    assert 0.9 * in_memory <= took["peak_bytes"] - took["imports_bytes"] <= 1.15 * in_memory + 0.1e9
    assert 1.15 * in_memory + 0.1e9 < 2 * in_memory


def test_nothing_is_initialised_at_random(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.random.get_rng_state()
    found = detect(load_settings(overrides={"model.esm_model": str(small_model)}).model)
    load_network(found, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_change_between_detection_and_loading_are_refused(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.folder / "esm2_changing.pt"
    shutil.copy(small_model, path)

    def load(*arguments: Any) -> object:  # noqa: ANN401
        with path.open("ab") as file:
            file.write(b"x")
        return load_network(*arguments)

    monkeypatch.setattr(loading, "load_network", load)
    answer = script("embed", "--esm-model", path, "--input", SOME_PROTEINS)
    assert answer.status == 2
    assert answer.error == f"{path}: changed while it was being read"
    assert script("history", "--json").json == []


def product_is_rounded() -> bool:
    """Return whether torch rounds float32 here and now: not every processor does when told to."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(512, 512, generator=draw) for _ in range(2))
    exact = x.double() @ weight.double().T
    return bool((torch.nn.functional.linear(x, weight) - exact).abs().max() > 1e-3)


def test_what_torch_was_told_to_round_is_refused(
    script: Script, place: Place, small_model: Path
) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        rounded = product_is_rounded()
        answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert answer.status == (4 if rounded else 0), answer.err
    if rounded:
        fact = "cpu: operands of float32 products are rounded: "
        assert answer.error == f"{fact}torch.get_float32_matmul_precision() = medium"


def test_what_the_environment_rounds_is_refused() -> None:
    """`embed` asks the same. oneDNN reads the variable once, in a process of its own."""
    program = (
        "import torch\n"
        "from lib.network.linear import refuse_rounding\n"
        f"{inspect.getsource(product_is_rounded)}"  # importing this file takes as long as torch
        "print(product_is_rounded(), flush=True)\n"
        "refuse_rounding(torch.device('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DNNL_DEFAULT_FPMATH_MODE": "BF16"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    rounded = {"True\n": True, "False\n": False}[done.stdout]
    assert done.returncode == (1 if rounded else 0), done.stderr
    assert ("are rounded: DNNL_DEFAULT_FPMATH_MODE = BF16, torch." in done.stderr) == rounded


def test_a_product_that_is_rounded_is_refused_on_any_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounded(x: torch.Tensor, weight_bias: Affine) -> torch.Tensor:
        return torch.nn.functional.linear(x.bfloat16().float(), *weight_bias)

    cpu = torch.device("cpu")
    linear.refuse_rounding(cpu)
    monkeypatch.setattr(linear, "linear", rounded)
    with pytest.raises(MachineError, match="cpu: operands of float32 products are rounded: "):
        linear.refuse_rounding(cpu)


def test_the_refusal_names_what_asks_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of NVIDIA set the variable; of torch's two kinds of settings, one is refused."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setattr(linear, "linear", lambda x, _: x + 1)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(MachineError) as refused:
            linear.refuse_rounding(torch.device("cpu"))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert str(refused.value).startswith(
        "cpu: operands of float32 products are rounded: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE = 1, "
        "torch.backends.mkldnn.matmul.fp32_precision = "
    )


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_weights_are_found_at_validation(
    script: Script, place: Place, small_model: Path, value: str
) -> None:
    content = torch.load(small_model, weights_only=False)
    content["model"]["encoder.sentence_encoder.layers.1.fc1.weight"][3, 5] = float(value)
    path = place.folder / "esm2_broken.pt"
    torch.save(content, path)
    answer = script("validate", "--esm-model", path)
    assert answer.status == 2
    assert answer.error == f"{path}: layer 2 gives non-finite values"


def test_validation_changes_nothing(script: Script, place: Place, small_model: Path) -> None:
    before = sorted(place.folder.rglob("*"))
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    for name, *more in (("validate",), ("embed", "--validate-config")):
        answer = script(name, *flags, *more)
        assert answer.status == 0, answer.err
        lines = answer.out.splitlines()
        assert lines[0].startswith("model esm2_small (untrained weights): 2 layers, hidden_dim 64")
        assert "15 records, 15 different sequences, 1,770 residues" in lines[1]
        assert lines[-1] == "no unfinished run"
        shown = script(name, *flags, *more, "--json").json
        assert shown["model"]["attention_heads"] == 4
        assert shown["input"]["records"] == 15
        assert shown["unfinished"] == []
    assert sorted(place.folder.rglob("*")) == before


def test_validation_finds_what_is_wrong_with_the_input(
    script: Script, place: Place, small_model: Path
) -> None:
    bad = place.folder / "bad.fasta"
    bad.write_text(">a\nMKJ\n")
    for name, *more in (("validate",), ("embed", "--validate-config")):
        answer = script(name, "--esm-model", small_model, "--input", bad, *more)
        assert answer.status == 2
        assert answer.error == (
            "record 0 (a): 'J' at residue 3 is not in the ESM-2 alphabet (input.unknown_residues)"
        )


def test_validation_does_not_download(script: Script, place: Place) -> None:
    answer = script("validate", "--esm-model", "esm2_t6_8M_UR50D",
                    "--set", "model.download_url=http://127.0.0.1:1/")  # fmt: skip
    assert answer.status == 2
    fact = "weights are not on disk (make download and embed download them)"
    assert answer.error == f"esm2_t6_8M_UR50D: {fact}"


def test_a_device_that_is_not_there(script: Script, place: Place, small_model: Path) -> None:
    count = torch.cuda.device_count()
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
                    "--set", f"compute.device=cuda:{count}")  # fmt: skip
    assert answer.status == 4
    assert answer.error == f"device cuda:{count}: torch sees {count} CUDA devices"


def test_threads_are_set_and_recorded(place: Place, small_model: Path) -> None:
    answer = place.run("embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
                       "--set", "compute.threads=1")  # fmt: skip
    assert "1 threads" in answer.err
    shown = place.run("history", "--run", "1", "--json")
    assert json.loads(shown.out)["attempts"][0]["threads"] == 1


def test_loading_is_benchmarked_beside_fair_esm(small_model: Path) -> None:
    assert measure("fair-esm", small_model)["ready_s"] > 0
