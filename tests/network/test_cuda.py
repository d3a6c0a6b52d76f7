"""CUDA: if this fails, vectors from a GPU are not those of the same model on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.network.esm2 import load_network
from lib.settings import load_settings
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.network.test_contacts import BOUNDS, FairEsm, predicted
from tests.network.test_network import MIXED_PACK, hidden
from tests.reference import Reference, read_run, worst_residue_error

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here"
)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_every_layer_of_a_mixed_pack_equals_fair_esm(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, 6, 320, 20)
    found = detect(load_settings(overrides={"model.esm_model": str(path)}).model)
    network, reference = load_network(found, torch.device("cuda", 0), dtype), Reference(path)
    layers = range(7)
    computed = hidden(network, MIXED_PACK, layers)
    for i, sequence in enumerate(MIXED_PACK):
        truth = reference.tokens(sequence, layers)
        for layer in layers:
            assert worst_residue_error(computed[layer][i], truth[layer]) <= bound


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_contacts_of_a_mixed_pack_are_those_of_fair_esm(
    small_model: Path, dtype: torch.dtype
) -> None:
    found = predicted(small_model, MIXED_PACK, dtype, torch.device("cuda", 0))
    for one, sequence in zip(found, MIXED_PACK, strict=True):
        assert np.abs(one - FairEsm(small_model)(sequence)).max() <= BOUNDS[dtype]


def test_auto_is_float16_and_a_run_ends(script: Script, place: Place, small_model: Path) -> None:
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    assert "precision float16 (auto: float16 on CUDA)" in answer.err
    assert len(read_run(place.output / "run-000001")) == 15
