"""Element-wise steps: if this fails, a compiled network is another network, or compiles all day."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from lib.jobs import loading
from lib.network.attention import attend, sequence_bounds
from lib.network.elementwise import PLAIN, compiled
from lib.network.esm2 import Network
from lib.network.groups import group_equal_lengths
from lib.network.linear import Affine, linear, linear_add, linear_gelu, rows_of
from lib.network.rotary import turns_by_token
from lib.sequences.alphabet import tokenise
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.network.test_network import (
    BOUNDS,
    MIXED_PACK,
    assert_within_bounds,
    hidden,
    load,
    truth_of,
)
from tests.reference import read_run

LAYERS = range(3)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Forget what torch has compiled and counted in this process, before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_the_plain_steps_are_within_the_bounds_of_fair_esm_in_every_precision(
    small_model: Path,
) -> None:
    truth = truth_of(small_model, MIXED_PACK)
    for dtype in BOUNDS:
        network = load(small_model, dtype)
        network.elementwise, network.fused = PLAIN, None
        assert_within_bounds(network, MIXED_PACK, truth)


def test_packs_of_any_size_are_computed_by_one_graph_of_each_step_as_by_the_plain_steps(
    small_model: Path, nothing_compiled: None
) -> None:
    network = load(small_model, torch.bfloat16)
    network.elementwise, network.fused = compiled("aot_eager"), None
    packs = [MIXED_PACK, MIXED_PACK[3:], ["M"]]
    found = [hidden(network, MIXED_PACK, LAYERS)]
    # The layer norm after the last layer is float32, so that `added` has two.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    found += [hidden(network, pack, LAYERS) for pack in packs[1:]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    assert not torch._dynamo.utils.counters["graph_break"]
    network.elementwise = PLAIN
    for pack, layers in zip(packs, found, strict=True):
        for layer, parts in hidden(network, pack, LAYERS).items():
            for one, other in zip(parts, layers[layer], strict=True):
                assert (one == other).all()


def test_inductor_is_told_not_to_choose_kernels_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of a sum add in different orders: the bits would differ from machine to machine."""
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda _, **options: asked.append(options["options"]))
    compiled()
    assert asked == [{"deterministic": True}] * 4
    assert torch._inductor.config.deterministic is False  # or the option would do nothing


def by_its_kernels(network: Network, pack: list[str]) -> torch.Tensor:
    """Return the last layer of a pack, (T, hidden_dim), by the kernels for a CPU one by one."""

    def norm(x: torch.Tensor, weight_bias: Affine) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), *weight_bias, eps=1e-5)

    groups = group_equal_lengths([len(sequence) for sequence in pack])
    tokens = torch.from_numpy(tokenise([sequence.encode() for sequence in pack])).long()
    rotary, bounds = turns_by_token(groups, network._inv_freq), sequence_bounds(groups)
    x = F.embedding(tokens, network._embedding) * 0.88
    rows = rows_of(len(x), x.device, network.dtype)
    x = F.pad(x, (0, 0, 0, rows - len(x)))
    heads = network.shape.attention_heads
    for layer in network._layers:
        qkv = linear(norm(x, layer.attention_norm).to(network.dtype), layer.qkv)
        qkv = qkv[: len(tokens)].view(len(tokens), 3, heads, -1)
        x = linear_add(attend(qkv, rotary, groups, bounds, rows).view(x.shape), layer.out, x)
        inner = linear_gelu(norm(x, layer.ffn_norm).to(network.dtype), layer.fc1)
        x = linear_add(inner, layer.fc2, x)
    return norm(x, network._final_norm)[: len(tokens)]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_uncompiled_bits_are_those_of_the_kernels_for_a_cpu(
    small_model: Path, dtype: torch.dtype
) -> None:
    network = load(small_model, dtype)
    network.fused = None
    assert network.elementwise is None
    with torch.inference_mode():
        expected = by_its_kernels(network, MIXED_PACK)
    found = hidden(network, MIXED_PACK, [2])[2]
    assert torch.equal(torch.cat([torch.from_numpy(one) for one in found]), expected)


def test_a_compiled_run_is_only_resumed_compiled(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_compiled: None,
) -> None:
    monkeypatch.setattr(loading, "compiled", partial(compiled, "aot_eager"))
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    # One thread: torch compiles anew for each number of threads.
    compile_it = ["--set", "compute.compile=yes", "--set", "compute.threads=1"]
    compile_it += ["--set", "compute.fused_attention=no"]  # else nothing is turned apart
    answer = script("embed", *flags, *compile_it)
    assert answer.status == 0, answer.err
    assert ", compiled; " in answer.err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    answer = script("resume", "--run", "1", "--set", "compute.compile=no")
    assert answer.status == 3
    assert answer.error == "run 1: compile is True in the run, False in its settings"
    assert script("resume", "--run", "1").status == 0
    assert len(read_run(place.output / "run-000001")) == 15


def test_an_uncompiled_run_is_not_resumed_compiled(
    script: Script, small_model: Path, place: Place
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    answer = script("embed", *flags)
    assert answer.status == 0
    assert "compiled" not in answer.err
    answer = script("resume", "--run", "1", "--set", "compute.compile=yes")
    assert answer.status == 3
    assert answer.error == "run 1: compile is False in the run, True in its settings"


def test_what_torch_cannot_compile_is_one_line(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_compiled: None,
) -> None:
    def without_compiler(*_: object) -> None:
        raise RuntimeError("no compiler\nin any\nfolder")

    monkeypatch.setattr(loading, "compiled", partial(compiled, without_compiler))
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
                    "--set", "compute.compile=yes")  # fmt: skip
    assert answer.status == 4
    assert answer.error.startswith("compute.compile: BackendCompilerFailed: ")
    assert "no compiler in any folder" in answer.error
    assert answer.err.count("error: ") == 1
