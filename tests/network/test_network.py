"""The network against fair-esm: if this fails, every vector that anyone keeps is wrong."""

from __future__ import annotations

import runpy
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.errors import WeightsError
from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.network import linear
from lib.network.elementwise import PLAIN
from lib.network.esm2 import Network, load_network
from lib.network.fused import FusedAttention
from lib.network.vectors import launch
from lib.sequences.alphabet import LETTERS, tokenise
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence as FastaSequence
from lib.settings import load_settings
from schema.parquet import VectorColumn
from tests.conftest import WHOLE_PROTEINS
from tests.reference import Array, Reference, fasta, worst_residue_error

FLOAT32_BOUND = 1e-5
# Bounds of the design: the error of a residue at any layer; the cosine of pooled vectors.
BOUNDS = {
    torch.float32: (FLOAT32_BOUND, 0.9999),
    torch.bfloat16: (2e-2, 0.9999),
    torch.float16: (3e-3, 0.9999),
}

ALPHABET = LETTERS.decode()
MIXED_PACK = sorted(
    [ALPHABET, "M", "W", "MKTAYIAKQR" * 4, "MKTAYIAKQL" * 4, "ACDEF" * 60, "X", "GG"],
    key=len,
    reverse=True,
)

# layers, hidden_dim, heads: released shapes (deep and wide ones cut to a few layers to stay quick),
# and odd ones with heads 16, 24, 32, 64 and 128 wide.
WIDTH_OF_650M = (2, 1280, 20)
IN_HALF_PRECISION = [(6, 320, 20), (12, 480, 20), (6, 640, 20), WIDTH_OF_650M, (33, 64, 4)]
SHAPES = [
    (1, 2560, 40),
    (1, 16, 1),
    (1, 320, 20),
    (4, 384, 16),
    (2, 1024, 16),
    (2, 512, 4),
    (5, 320, 5),
]


# Contacts are probabilities, and their bounds absolute: float32's is the design's, half precision
# has its bounds of vectors. They are compared at SHAPES and at WIDTH_OF_650M, in half precision at
# the smaller of SHAPES.
CONTACTS_IN_HALF_PRECISION = [shape for shape in SHAPES if shape[0] * shape[1] <= 2500]


def load(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Network:
    """Load a model with its contact regression."""
    found = detect(load_settings(overrides={"model.esm_model": str(path)}).model, contacts=True)
    return load_network(found, device, dtype)


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


def contacts_of(network: Network, pack: Sequence[str]) -> list[Array]:
    """Return the (residues, residues) contacts of the sequences of a pack."""
    owner, column = [Owner(0, "a", "", 1, "")], VectorColumn("contacts")
    sequences = [FastaSequence(sequence.encode(), owner) for sequence in pack]
    maps = launch(network, sequences, [column], "float32").collect().columns[column]
    assert isinstance(maps, list)
    return maps


def assert_contacts_within_bounds(
    network: Network, pack: Sequence[str], truth: Sequence[Array]
) -> None:
    bound, _ = BOUNDS[network.dtype]
    assert max(map(np.ptp, truth)) > 0.3, "contacts that hardly differ compare nothing"
    for sequence, one, expected in zip(pack, contacts_of(network, pack), truth, strict=True):
        assert one.shape == expected.shape == (len(sequence), len(sequence))
        assert one.dtype == np.float32
        assert np.abs(one - expected).max() <= bound, (sequence[:20], network.dtype)


def by_every_kernel(network: Network) -> Iterator[Network]:
    """Yield the network with attention by torch, and by each kernel that this machine has.

    It stays with the last of them.
    """
    kernel = network.fused
    for network.fused in dict.fromkeys([None, kernel and FusedAttention(tiles=False), kernel]):
        yield network


Truth = list[dict[int, Array]]


def truth_and_contacts(
    path: Path, pack: Sequence[str], *, contacts: bool = True
) -> tuple[Truth, list[Array]]:
    """Return what fair-esm has for every sequence of a pack: by layer, and contacts if wanted."""
    reference = Reference(path)
    layers = range(reference.num_layers + 1)
    both = [reference.tokens_and_contacts(sequence, layers, contacts=contacts) for sequence in pack]
    return [layered for layered, _ in both], [maps for _, maps in both]


def truth_of(path: Path, pack: Sequence[str]) -> Truth:
    """Return what fair-esm has for every sequence of a pack, by layer."""
    return truth_and_contacts(path, pack, contacts=False)[0]


def assert_within_bounds(network: Network, pack: Sequence[str], truth: Truth) -> None:
    """Compare every residue at every layer, and the mean of a sequence."""
    bound, cosine_bound = BOUNDS[network.dtype]
    layers = range(network.shape.num_layers + 1)
    found = hidden(network, pack, layers)
    for i, sequence in enumerate(pack):
        for layer in layers:
            where = (network.dtype, sequence[:20], len(sequence), layer)
            one, other = found[layer][i], truth[i][layer]
            assert worst_residue_error(one, other) <= bound, where
            one, other = one[1:-1].mean(0), other[1:-1].mean(0)
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert cosine >= cosine_bound, where


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layer_and_the_contacts_of_a_mixed_pack_are_within_their_bounds_of_fair_esm(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, *shape)
    truth, contacts = truth_and_contacts(path, MIXED_PACK)
    for network in by_every_kernel(load(path)):
        assert_within_bounds(network, MIXED_PACK, truth)
    assert_contacts_within_bounds(network, MIXED_PACK, contacts)
    if shape in CONTACTS_IN_HALF_PRECISION:
        for dtype in (torch.bfloat16, torch.float16):
            assert_contacts_within_bounds(load(path, dtype), MIXED_PACK, contacts)


@pytest.mark.parametrize("shape", IN_HALF_PRECISION, ids=str)
def test_every_layer_of_a_mixed_pack_is_within_its_bounds_in_every_precision(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    path = tmp_path / "esm2_made.pt"
    make_model(path, *shape)
    with_contacts = shape == WIDTH_OF_650M
    truth, contacts = truth_and_contacts(path, MIXED_PACK, contacts=with_contacts)
    if with_contacts:
        assert_contacts_within_bounds(load(path), MIXED_PACK, contacts)
    for dtype in (torch.float32, torch.bfloat16):
        for network in by_every_kernel(load(path, dtype)):
            assert_within_bounds(network, MIXED_PACK, truth)
    # float16 is a GPU's, and a CPU is slow at it: without the longest where it is much.
    start = 1 if shape[0] * shape[1] > 5_000 else 0
    assert_within_bounds(load(path, torch.float16), MIXED_PACK[start:], truth[start:])


@pytest.mark.parametrize(("shape", "seed"), [((6, 320, 20), 2), ((33, 64, 4), 2)], ids=str)
def test_biases_that_all_but_cancel_are_within_the_bounds(
    tmp_path: Path, shape: tuple[int, int, int], seed: int
) -> None:
    """Outliers of two layers with opposite signs: rounded with the products, they missed them."""
    path = tmp_path / "esm2_made.pt"
    make_model(path, *shape, seed=seed)
    truth = truth_of(path, MIXED_PACK)
    for dtype in BOUNDS:
        network = load(path, dtype)
        assert_within_bounds(network, MIXED_PACK, truth)
    network.elementwise = PLAIN  # the steps that are compiled
    assert_within_bounds(network, MIXED_PACK, truth)


@pytest.mark.parametrize("is_by_onednn", [True, False], ids=["oneDNN", "torch"])
def test_products_of_both_libraries_are_within_the_bounds_of_fair_esm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_by_onednn: bool
) -> None:
    """A processor has the one that is faster there."""
    path = tmp_path / "esm2_made.pt"
    make_model(path, 6, 320, 20)
    truth, contacts = truth_and_contacts(path, MIXED_PACK)
    for dtype in linear._BY_ONEDNN:
        if is_by_onednn and dtype is torch.bfloat16 and not linear._BY_ONEDNN[dtype]:
            continue  # oneDNN has it on some processors only
        monkeypatch.setitem(linear._BY_ONEDNN, dtype, is_by_onednn)
        network = load(path, dtype)
        tokens = sum(map(len, MIXED_PACK)) + 2 * len(MIXED_PACK)
        rows = linear.rows_of(tokens, network.device, dtype)
        assert (rows % 64, rows >= tokens) == (0, True) if is_by_onednn else (rows == tokens)
        assert_within_bounds(network, MIXED_PACK, truth)
        assert_contacts_within_bounds(network, MIXED_PACK, contacts)


@pytest.mark.parametrize(
    ("vendor", "has_mkl", "is_faster"),
    [("GenuineIntel", True, True), ("GenuineIntel", False, False), ("AuthenticAMD", True, False)],
)
def test_mkl_computes_float32_on_the_processors_of_its_maker(
    monkeypatch: pytest.MonkeyPatch, vendor: str, has_mkl: bool, is_faster: bool
) -> None:
    monkeypatch.setattr("lib.network.device.cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    again = runpy.run_path(linear.__file__)
    assert again["_MKL_IS_FASTER"] is is_faster
    assert again["_BY_ONEDNN"][torch.float32] is not is_faster


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


# What torch has MKL's vector library do on a CPU: ATen/cpu/vml.h.
OF_MKLS_VECTOR_LIBRARY = [
    "acos",
    "asin",
    "atan",
    "cos",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "sqrt",
    "tan",
    "tanh",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_computed_by_mkls_vector_library(small_model: Path, dtype: torch.dtype) -> None:
    """Of two threads that begin with it, one may get half of the bits."""
    for network in by_every_kernel(load(small_model, dtype)):
        with Operations() as seen:
            hidden(network, MIXED_PACK, [2])
            contacts_of(network, MIXED_PACK)
        assert {"polar", "baddbmm"} < seen.names
        assert seen.names.isdisjoint(OF_MKLS_VECTOR_LIBRARY)


def test_float16_weights_are_computed_in_float32_as_fair_esm_does(tmp_path: Path) -> None:
    # The 3B and 15B releases are stored so, rotary frequencies included.
    path = tmp_path / "esm2_half.pt"
    make_model(path, 3, 320, 20, dtype=torch.float16)
    assert_within_bounds(load(path), MIXED_PACK, truth_of(path, MIXED_PACK))


def test_without_token_dropout_embeddings_are_not_scaled(tmp_path: Path) -> None:
    path = tmp_path / "esm2_plain.pt"
    make_model(path, 2, 64, 4, token_dropout=False)
    assert_within_bounds(load(path), MIXED_PACK, truth_of(path, MIXED_PACK))


def test_real_proteins_in_one_pack_equal_fair_esm(small_model: Path) -> None:
    pack = [sequence for _, sequence in fasta(WHOLE_PROTEINS)]
    assert_within_bounds(load(small_model), pack, truth_of(small_model, pack))


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


def test_an_inner_array_is_gone_before_that_of_the_next_layer(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the largest array, and beside the next one a third of a pack's memory."""
    inner: list[weakref.ref[torch.Tensor]] = []
    true_gelu = Network._gelu

    def gelu(self: Network, *arguments: Any) -> torch.Tensor:  # noqa: ANN401
        assert not any(earlier() is not None for earlier in inner)
        made = true_gelu(self, *arguments)
        inner.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Network, "_gelu", gelu)
    hidden(load(small_model), MIXED_PACK, [1, 2])
    assert len(inner) == 2


def test_test_weights_have_outlier_channels(tmp_path: Path) -> None:
    path = tmp_path / "esm2_outliers.pt"
    make_model(path, 6, 320, 20)
    middle = hidden(load(path), MIXED_PACK, [3])[3][0]
    by_channel = np.sqrt((middle**2).mean(0))
    assert by_channel.max() > 20 * np.median(by_channel)


def test_rotary_frequencies_that_differ_by_layer_are_refused(
    small_model: Path, tmp_path: Path
) -> None:
    content = torch.load(small_model, weights_only=False)
    content["model"]["encoder.sentence_encoder.layers.1.self_attn.rot_emb.inv_freq"] *= 1.5
    path = tmp_path / "esm2_other.pt"
    torch.save(content, path)
    found = detect(load_settings(overrides={"model.esm_model": str(path)}).model)
    with pytest.raises(WeightsError, match="inv_freq is not the same in every layer"):
        load_network(found, torch.device("cpu"), torch.float32)
