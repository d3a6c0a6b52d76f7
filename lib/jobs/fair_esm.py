"""fair-esm's own module: loaded by fair-esm's loader, or filled by this program's reader.

Loading by fair-esm is esm.pretrained.load_model_and_alphabet_core, which every one of fair-esm's
loaders ends in. load_model_and_alphabet_local would take only names that begin with esm2, want a
contact regression beside every file, and hold the model twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import esm
import numpy as np
import numpy.typing as npt
import torch

from lib.errors import WeightsError
from lib.files import file_sha256
from lib.models.detection import Detection
from lib.models.held_file import HeldFile
from lib.models.torch_archive import load_archive
from lib.models.weights import Weights
from schema.esm2_config import ModelShape

__all__ = [
    "Answer",
    "FairEsm",
    "Reference",
    "fair_esm_tokens",
    "load_by_fair_esm",
    "load_by_reader",
    "needed_bytes",
]

# fair-esm and transformers hold the attention of all heads as scores, as probabilities and as a
# copy. For contacts they hold that of all layers as computed, stacked, without <eos>, copied,
# symmetric and corrected.
_MAPS_ALIVE = 3
_STACKS_ALIVE = 6

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a reference computes from a sequence.

    tokens: (residues + 2, hidden_dim) by layer; contacts: (residues, residues), or None.
    """

    tokens: dict[int, Array]
    contacts: Array | None


class Reference(Protocol):
    """A model of another library in float32 on the CPU, one sequence at a time."""

    @property
    def library(self) -> str:
        """The library and its version."""

    def compute(self, residues: str, layers: Iterable[int], *, contacts: bool) -> Answer:
        """Return what the library computes from a sequence at `layers`."""


class FairEsm:
    """fair-esm's ESM2, or PEFT's around it."""

    library = f"fair-esm {version('fair-esm')}"

    def __init__(self, model: torch.nn.Module) -> None:
        """Compute with `model`, which is called as ESM2 is."""
        self.model = model.eval()

    def compute(self, residues: str, layers: Iterable[int], *, contacts: bool) -> Answer:
        """Return what fair-esm computes from a sequence at `layers`."""
        tokens = fair_esm_tokens(residues)
        with torch.inference_mode():
            found = self.model(tokens, repr_layers=[*layers], return_contacts=contacts)
        hidden = {layer: one[0].numpy() for layer, one in found["representations"].items()}
        return Answer(hidden, found["contacts"][0].numpy() if contacts else None)


def needed_bytes(shape: ModelShape, residues: int, *, contacts: bool) -> int:
    """Return roughly how many bytes a sequence takes in a reference, the model not counted."""
    one_map = 4 * (residues + 2) ** 2
    layers = shape.num_layers * _STACKS_ALIVE if contacts else 0
    hidden = 4 * (residues + 2) * shape.hidden_dim * (shape.num_layers + 1)
    return hidden + one_map * shape.attention_heads * (_MAPS_ALIVE + layers)


def fair_esm_tokens(residues: str) -> torch.Tensor:
    """Return (1, residues + 2) token numbers by fair-esm's alphabet, which transformers shares."""
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    tokens: torch.Tensor = alphabet.get_batch_converter()([("", residues)])[2]
    return tokens


def load_by_fair_esm(weights: Weights, detection: Detection) -> torch.nn.Module:
    """Load a .pt file by fair-esm itself, with the contact regression beside it if it is wanted.

    Raises what fair-esm raises for a file that it does not take, WeightsError if the regression
    changed meanwhile.
    """
    regression = detection.regression
    apart = None if regression is None or regression.sha256 is None else regression.path
    state = load_archive(HeldFile(weights.path))
    beside = None if apart is None else load_archive(HeldFile(apart))
    model, _ = esm.pretrained.load_model_and_alphabet_core("esm2", state, beside)
    if regression is not None and apart is not None and file_sha256(apart) != regression.sha256:
        raise WeightsError(f"{apart}: changed while it was being read")
    loaded: torch.nn.Module = model.float()
    return loaded


def load_by_reader(weights: Weights, detection: Detection) -> torch.nn.Module:
    """Fill fair-esm's module with what this program reads from weights of any format."""
    shape = detection.shape
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = esm.model.esm2.ESM2(
        shape.num_layers, shape.hidden_dim, shape.attention_heads, alphabet, shape.token_dropout
    )
    names = list(shape.trunk_shapes())
    names += [name for name in weights.tensors if name.endswith("rot_emb.inv_freq")]
    state = dict(weights.read(names))
    if detection.regression is not None:
        state["contact_head.regression.weight"] = detection.regression.weight.reshape(1, -1)
        state["contact_head.regression.bias"] = torch.tensor([detection.regression.bias])
    # Not strict: the language-model head is left out, since no vector passes through it.
    model.load_state_dict(state, strict=False)
    filled: torch.nn.Module = model
    return filled
