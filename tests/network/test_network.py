"""The network against fair-esm: if this fails, every vector that anyone keeps is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.network.esm2 import Network, load_network
from lib.sequences.alphabet import LETTERS, tokenise
from lib.settings import load_settings
from tests.conftest import SOME_PROTEINS
from tests.reference import Reference, fasta, worst_residue_error

FLOAT32_BOUND = 1e-5

ALPHABET = LETTERS.decode()
MIXED_PACK = sorted(
    [ALPHABET, "M", "W", "MKTAYIAKQR" * 12, "MKTAYIAKQL" * 12, "ACDEF" * 60, "X", "GG"],
    key=len,
    reverse=True,
)

# layers, hidden_dim, heads: released shapes first (deep and wide ones cut to a few layers to
# stay quick), then odd ones with heads 16, 24, 32, 64 and 128 wide.
SHAPES = [
    (6, 320, 20),
    (12, 480, 20),
    (30, 640, 20),
    (3, 1280, 20),
    (2, 2560, 40),
    (1, 16, 1),
    (1, 320, 20),
    (4, 384, 16),
    (2, 1024, 16),
    (2, 512, 4),
    (5, 320, 5),
]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Network:
    found = detect(load_settings(overrides={"model.esm_model": str(path)}).model)
    return load_network(found, torch.device("cpu"), dtype)


def hidden(
    network: Network, pack: Sequence[str], layers: Sequence[int]
) -> dict[int, list[np.ndarray]]:
    """Return, by layer, the (residues + 2, hidden_dim) array of every sequence of a pack."""
    tokens = torch.from_numpy(tokenise([sequence.encode() for sequence in pack]))
    lengths = [len(sequence) for sequence in pack]
    with torch.inference_mode():
        return {
            layer: [part.cpu().numpy().copy() for part in torch.split(x, [n + 2 for n in lengths])]
            for layer, x in network.forward(tokens, lengths, layers)
        }


def assert_equals_fair_esm(path: Path, pack: Sequence[str]) -> None:
    network, reference = load(path), Reference(path)
    layers = range(network.shape.num_layers + 1)
    found = hidden(network, pack, layers)
    for i, sequence in enumerate(pack):
        truth = reference.tokens(sequence, layers)
        for layer in layers:
            error = worst_residue_error(found[layer][i], truth[layer])
            assert error <= FLOAT32_BOUND, (sequence[:20], len(sequence), layer)


@pytest.mark.parametrize(("num_layers", "hidden_dim", "heads"), SHAPES)
def test_every_layer_of_a_mixed_pack_equals_fair_esm(
    tmp_path: Path, num_layers: int, hidden_dim: int, heads: int
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, num_layers, hidden_dim, heads)
    assert_equals_fair_esm(path, MIXED_PACK)


def test_float16_weights_are_computed_in_float32_as_fair_esm_does(tmp_path: Path) -> None:
    # The 3B and 15B releases are stored so, rotary frequencies included.
    path = tmp_path / "esm2_half.pt"
    make_model(path, 3, 320, 20, dtype=torch.float16)
    assert_equals_fair_esm(path, MIXED_PACK)


# Bounds of the design, per residue at every layer; pooled vectors: cosine.
HALF_BOUNDS = {torch.bfloat16: (2e-2, 0.9999), torch.float16: (3e-3, 0.9999)}


@pytest.mark.parametrize("dtype", HALF_BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("num_layers", "hidden_dim", "heads"),
    [(6, 320, 20), (12, 480, 20), (30, 640, 20), (2, 1280, 20), (33, 64, 4)],
)
def test_half_precision_stays_within_its_bounds_at_every_layer(
    tmp_path: Path, num_layers: int, hidden_dim: int, heads: int, dtype: torch.dtype
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, num_layers, hidden_dim, heads)
    network, reference = load(path, dtype), Reference(path)
    layers = range(num_layers + 1)
    bound, cosine_bound = HALF_BOUNDS[dtype]
    found = hidden(network, MIXED_PACK, layers)
    for i, sequence in enumerate(MIXED_PACK):
        truth = reference.tokens(sequence, layers)
        for layer in layers:
            error = worst_residue_error(found[layer][i], truth[layer])
            assert error <= bound, (sequence[:20], len(sequence), layer)
            one, other = found[layer][i][1:-1].mean(0), truth[layer][1:-1].mean(0)
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert cosine >= cosine_bound, (sequence[:20], len(sequence), layer)


def test_without_token_dropout_embeddings_are_not_scaled(tmp_path: Path) -> None:
    path = tmp_path / "esm2_plain.pt"
    make_model(path, 2, 64, 4, token_dropout=False)
    assert_equals_fair_esm(path, MIXED_PACK)


def test_real_proteins_in_one_pack_equal_fair_esm(small_model: Path) -> None:
    assert_equals_fair_esm(small_model, [sequence for _, sequence in fasta(SOME_PROTEINS)])


def test_pack_mates_do_not_change_a_vector(small_model: Path) -> None:
    network = load(small_model)
    alone = [hidden(network, [sequence], [2])[2][0] for sequence in MIXED_PACK]
    together = hidden(network, MIXED_PACK, [2])[2]
    for one, other in zip(alone, together, strict=True):
        assert worst_residue_error(other, one) <= FLOAT32_BOUND


def test_layers_after_the_last_wanted_are_not_computed(small_model: Path) -> None:
    network = load(small_model)
    network._layers[1] = None  # type: ignore[call-overload]
    assert list(hidden(network, ["MK"], [0, 1])) == [0, 1]


def test_test_weights_have_outlier_channels(tmp_path: Path) -> None:
    path = tmp_path / "esm2_outliers.pt"
    make_model(path, 6, 320, 20)
    middle = hidden(load(path), MIXED_PACK, [3])[3][0]
    by_channel = np.sqrt((middle**2).mean(0))
    assert by_channel.max() > 20 * np.median(by_channel)
