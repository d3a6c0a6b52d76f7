"""Benchmarks: if this fails, a published speed was measured on something else than ESM-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.contenders import Embed, fair_esm, openvino, ours, transformers_sdpa
from benchmarks.measure import agreement, end_to_end_share, in_turn, roof
from benchmarks.processes import Contender, Spec
from benchmarks.workload import MIXES, sequences, useful_flops
from lib.jobs.embedding import Job, work
from lib.ledger.history import query
from lib.models.detection import Detection, detect
from lib.network.esm2 import Network
from lib.settings import load_settings
from scripts.benchmark import table_rows
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
            "times_openvino": 4.0,
            "cosine": 1.0, "error": 0.0, "agrees": agrees, "start_seconds": 1.0, "peak_gb": 2.0,
        }  # fmt: skip

    case = {
        "case": "c",
        "contenders": [
            side("fair-esm float32", True),
            side("transformers float32", False),
            side("openvino float32", True),
            side("esm-ledger float32", True),
        ],
        "end_to_end_share_of_forward": [0.97],
    }
    fair, peer, other, ledger, share = table_rows(case)
    assert fair[5:8] == [2.0, "disagrees", 4.0]
    assert peer[5:8] == ["disagrees"] * 3
    assert other[5:8] == ledger[5:8] == [2.0, "disagrees", 4.0]
    assert share[4] == 0.97
