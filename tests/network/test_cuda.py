"""CUDA: if this fails, vectors from a GPU are not those of the same model on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.models.untrained import make_model
from lib.network.elementwise import compiled
from tests.conftest import WHOLE_PROTEINS, Place, Script
from tests.network.test_network import (
    BOUNDS,
    MIXED_PACK,
    assert_contacts_within_bounds,
    assert_within_bounds,
    load,
    truth_of,
)
from tests.reference import Reference, read_run

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none here"
)


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_layer_and_the_contacts_of_a_mixed_pack_are_those_of_fair_esm(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, 6, 320, 20)
    reference, network = Reference(path), load(path, dtype, CUDA)
    truth = truth_of(path, MIXED_PACK)
    assert_within_bounds(network, MIXED_PACK, truth)
    network.elementwise = compiled()
    assert_within_bounds(network, MIXED_PACK, truth)
    assert_contacts_within_bounds(network, MIXED_PACK, [*map(reference.contacts, MIXED_PACK)])


def test_auto_is_float16_and_a_run_ends(script: Script, place: Place, small_model: Path) -> None:
    place.set("compute", "device", "auto")
    answer = script("embed", "--esm-model", small_model, "--input", WHOLE_PROTEINS)
    assert answer.status == 0, answer.err
    assert "precision float16 (auto: float16 on CUDA)" in answer.err
    assert len(read_run(place.output / "run-000001")) == 15
