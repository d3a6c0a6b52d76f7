"""Benchmarks: if this fails, a published speed was measured on something else than ESM-2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.contenders import Embed, fair_esm, openvino, ours, transformers_sdpa
from benchmarks.measure import agreement, end_to_end_share, in_turn, roof
from benchmarks.peers import contender_specs, rival, table_rows
from benchmarks.processes import Contender, Spec
from benchmarks.workload import MIXES, Case, sequences, useful_flops
from lib.errors import MachineError, SettingsError
from lib.jobs.embedding import Job, work
from lib.ledger.history import query
from lib.models.detection import Detection, detect
from lib.network.esm2 import Network
from lib.settings import load_settings
from scripts import benchmark
from tests.conftest import Place

CPU = torch.device("cpu")


def detected(path: Path) -> Detection:
    return detect(load_settings(overrides={"model.esm_model": str(path)}).model)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_seeded_and_within_its_lengths(mix: str) -> None:
    drawn = sequences(mix, 200)
    assert drawn == sequences(mix, 200)
    low, high = {"orf": (50, 166), "proteome": (30, 1022), "uniref": (11, 1022)}[mix]
    lengths = [len(one) for one in drawn]
    assert low <= min(lengths) < max(lengths) <= high


def test_useful_operations_are_those_of_the_matrices_and_of_attention() -> None:
    # One layer, width 2, one residue, so three tokens: by hand from the shapes.
    matrices = 2 * 3 * (4 * 2 * 2 + 2 * 8 * 2)
    scores_and_values = 2 * 3 * 3 * 2 + 2 * 3 * 3 * 2
    assert useful_flops([1], 1, 2) == matrices + scores_and_values


def assert_contenders_agree(path: Path, contenders: dict[str, Embed]) -> None:
    workload = sequences("orf", 12)
    figures = in_turn(contenders, workload, 2)
    truth = figures["fair-esm"].vectors
    for name, one in figures.items():
        cosine, error = agreement(one.vectors, truth)
        assert cosine > 0.99999, name
        assert error < 1e-5, name
        assert len(one.seconds) == 2


def test_ours_and_fair_esms_loop_agree(small_model: Path) -> None:
    found = detected(small_model)
    contenders = {"fair-esm": fair_esm(found, CPU), "ours": ours(found, CPU, torch.float32, 500)}
    assert_contenders_agree(small_model, contenders)


@pytest.mark.xdist_group("transformers")
def test_transformers_agrees(small_model: Path) -> None:
    found = detected(small_model)
    peer = transformers_sdpa(found, CPU, torch.float32)
    assert_contenders_agree(small_model, {"fair-esm": fair_esm(found, CPU), "peer": peer})


def test_openvino_agrees(small_model: Path) -> None:
    found = detected(small_model)
    peer = openvino(found, torch.float32)
    assert_contenders_agree(small_model, {"fair-esm": fair_esm(found, CPU), "peer": peer})


def test_a_contender_in_a_process_of_its_own_gives_the_same_vectors(small_model: Path) -> None:
    workload = sequences("orf", 5)
    contender = Contender(Spec("esm-ledger", small_model, "cpu", "float32", 500))
    try:
        found = contender(workload)
        assert contender.start_seconds > 0
        assert 1e8 < contender.peak_bytes() < 4e9
    finally:
        contender.close()
    here = ours(detected(small_model), CPU, torch.float32, 500)(workload)
    assert agreement(found, here)[1] < 1e-6


# What the package esm_cpp offers, with letters for tokens: it needs another numpy than ours.
ESM_CPP = """
import numpy as np

class Tokenizer:
    def encode(self, text, truncate):
        assert not truncate
        return [0, *map(ord, text), 2]

class Model:
    int8 = 0

    @classmethod
    def load_from_safetensors(cls, path):
        assert path.endswith("/model.safetensors")
        return cls()

    def quantize_weights(self):
        self.int8 = 1

    def forward_scheduled(self, tokens):
        assert all(one.dtype == np.int32 for one in tokens)
        return [np.tile(one[:, None], 33).astype(np.float32) for one in tokens]

    def forward_with_hidden_states(self, tokens):
        last = np.tile(tokens[:, None] + self.int8, 3).astype(np.float32)
        return None, [np.zeros_like(last), last]
"""


@pytest.mark.parametrize(("dtype", "added"), [("float32", 0), ("int8", 1)])
def test_esm_cpp_answers_from_a_python_of_its_own_with_logits_and_with_vectors(
    tmp_path: Path, dtype: str, added: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "esm_cpp.py").write_text(ESM_CPP)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr("benchmarks.esm_cpp.PYTHON", python)
    contender = Contender(Spec("esm-cpp", tmp_path / "model.safetensors", "cpu", dtype, 0))
    try:
        assert contender([b"AC", b"CCE"]).tolist() == [[66.0] * 33, [np.float32(203 / 3)] * 33]
        found = contender.vectors([b"AC", b"CCE"])
        assert found[:, 2].tolist() == [66 + added, np.float32(203 / 3 + added)]
        assert found.shape == (2, 3)
        assert 1e6 < contender.peak_bytes() < 1e9
    finally:
        contender.close()


def test_a_contender_without_its_python_or_with_one_that_ends_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec("esm-cpp", tmp_path / "model.safetensors", "cpu", "int8", 0)
    python = tmp_path / "python"
    monkeypatch.setattr("benchmarks.esm_cpp.PYTHON", python)
    with pytest.raises(MachineError, match=f"^{python}: no such file$"):
        Contender(spec)
    monkeypatch.setattr("benchmarks.esm_cpp.PYTHON", Path("/bin/false"))
    with pytest.raises(MachineError, match=r"^esm-cpp int8: its process ended early$"):
        Contender(spec)


def test_a_peer_is_compared_in_the_type_that_it_has() -> None:
    assert [rival("esm-cpp", kind) for kind in ("float32", "bfloat16")] == [
        "esm-cpp float32",
        "esm-cpp int8",
    ]
    assert rival("openvino", "bfloat16") == "openvino bfloat16"


def test_a_peer_that_is_left_out_is_not_started() -> None:
    def names(*without: str, device: str = "cpu") -> list[str]:
        where = torch.device(device)
        specs = contender_specs(Path("model.pt"), where, torch.bfloat16, 2048, without)
        return [f"{one.name} {one.dtype}" for one in specs]

    assert names("transformers", "esm-cpp") == [
        "fair-esm float32",
        "openvino float32",
        "esm-ledger float32",
        "openvino bfloat16",
        "esm-ledger bfloat16",
    ]
    assert len(names()) == 9
    on_a_gpu = ["fair-esm float32", "esm-ledger float32", "esm-ledger bfloat16"]
    assert names("transformers", device="cuda") == on_a_gpu


def test_agreement_sees_one_swapped_row() -> None:
    truth = np.eye(3, dtype=np.float32) + 0.1
    assert agreement(truth, truth)[0] == pytest.approx(1)
    assert agreement(truth[[1, 0, 2]], truth)[0] < 0.5


def test_the_roof_is_a_rate() -> None:
    assert 1e9 < roof(torch.float32, CPU, repeats=1) < 1e16


def test_fasta_to_commit_is_a_share_of_forward(
    place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    committed: list[int] = []

    def clock() -> float:
        """Give a time that only forward's tokens and committed sequences move on."""
        return sum(computed) + 1000 * sum(committed)

    def forward(network: Network, tokens: torch.Tensor, *rest: Any) -> Any:  # noqa: ANN401
        computed.append(len(tokens))
        return real_forward(network, tokens, *rest)

    def commit(job: Job) -> None:
        work(job)
        finished = query(job.settings.database.url, "SELECT finished_at FROM runs").rows
        assert all(at for (at,) in finished)
        committed.append(len(finished))

    real_forward = Network.forward
    monkeypatch.setattr(Network, "forward", forward)
    monkeypatch.setattr("benchmarks.measure.work", commit)
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", clock)
    settings = load_settings(place.config, {"model.esm_model": str(small_model)})
    shares = end_to_end_share(settings, detected(small_model), sequences("orf", 30), 2)
    tokens = sum(len(one) + 2 for one in sequences("orf", 30))
    assert shares == [tokens / (tokens + 1000), tokens / (tokens + 2000)]


def test_no_ratio_is_printed_where_a_side_disagrees() -> None:
    def side(name: str, agrees: bool) -> dict[str, object]:
        return {
            "contender": name, "seconds": [1.0, 1.1], "tokens_per_second": 5.0,
            "share_of_roof": 0.5, "times_fair_esm": 2.0, "times_transformers": 3.0,
            "times_openvino": 4.0, "times_esm-cpp": 5.0,
            "cosine": 1.0, "error": 0.0, "agrees": agrees, "start_seconds": 1.0, "peak_gb": 2.0,
        }  # fmt: skip

    case = {
        "case": "c",
        "contenders": [
            side("fair-esm float32", True),
            side("transformers float32", False),
            side("openvino float32", True),
            side("esm-cpp int8", False),
            side("esm-ledger float32", True),
            side("esm-ledger bfloat16", True),
        ],
        "end_to_end_share_of_forward": [0.97],
    }
    fair, peer, other, small, ledger, half, share = table_rows(case)
    assert fair[5:9] == [2.0, "disagrees", 4.0, 5.0]
    assert peer[5:9] == small[5:9] == ["disagrees"] * 4
    assert other[5:9] == ledger[5:9] == [2.0, "disagrees", 4.0, 5.0]
    assert half[5:9] == [2.0, 3.0, 4.0, "disagrees"]
    assert share[4] == 0.97


def test_what_was_measured_is_kept_though_the_next_case_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, third = "8M:orf:1", "35M:orf:2", "8M:uniref:3"

    def measured(case: Case, *_: object, **__: object) -> dict[str, str]:
        if case.count == 2:
            raise MachineError("out of memory")
        return {"case": str(case)}

    monkeypatch.setattr(benchmark, "measure_case", measured)
    with pytest.raises(SettingsError, match=r"nowhere: no such folder$"):
        benchmark.main(["--cases", first, "--to", str(tmp_path / "nowhere")])
    with pytest.raises(MachineError):
        benchmark.main(["--cases", first, second, "--to", str(tmp_path)])
    (figures,) = tmp_path.iterdir()
    assert json.loads(figures.read_text())["cases"] == [{"case": first}]
    with pytest.raises(MachineError):
        benchmark.main(["--cases", third, second, "--to", str(tmp_path)])
    again = figures.with_stem(f"{figures.stem}-2")
    assert sorted(tmp_path.iterdir()) == sorted([figures, again])
    assert json.loads(figures.read_text())["cases"] == [{"case": first}]
    assert json.loads(again.read_text())["cases"] == [{"case": third}]


@pytest.mark.parametrize(
    ("case", "fact"),
    [
        ("8Q:orf:3", "8Q:orf:3: size is none of 8M, 35M, 150M, 650M, 3B, 15B"),
        ("8M:orfs:3", "8M:orfs:3: mix is none of orf, proteome, uniref"),
        ("8M:orf", "8M:orf: sequences is not a whole number from 1"),
        ("8M:orf:0", "8M:orf:0: sequences is not a whole number from 1"),
    ],
)
def test_a_case_that_is_none_is_refused_before_any_is_measured(
    case: str, fact: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "measure_case", None)
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["--cases", "8M:orf:3", case])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(f": {fact}\n")
