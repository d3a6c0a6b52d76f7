"""fair-esm's own model, loaded with the weights in hand: the reference for a run's vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import esm
import numpy as np
import numpy.typing as npt
import torch

from lib.errors import MachineError
from lib.models.detection import Detection
from lib.models.regression import Regression
from lib.models.weights import Weights
from lib.network.memory import available_bytes
from schema.esm2_config import ModelShape

__all__ = ["FairEsm", "Reference"]

_CPU = torch.device("cpu")
# fair-esm holds the attention of all heads as scores, as probabilities and as a copy. For contacts
# it holds that of all layers as computed, stacked, without <eos>, copied, symmetric and corrected.
_MAPS_ALIVE = 3
_STACKS_ALIVE = 6

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What fair-esm computes from a sequence.

    tokens: (residues + 2, hidden_dim) by layer; contacts: (residues, residues), or None.
    """

    tokens: dict[int, Array]
    contacts: Array | None


class FairEsm:
    """fair-esm's ESM2 in float32 on the CPU, one sequence at a time."""

    def __init__(self, detection: Detection) -> None:
        """Load detected weights, and their contact regression if contacts are to be predicted.

        Raises MachineError if the model does not fit into memory, WeightsError if the weights
        changed meanwhile.
        """
        weights = detection.require_weights()
        self._shape = shape = detection.shape
        self._contacts = detection.regression is not None
        _refuse_if_too_large(weights.path, shape)
        alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
        self._model = esm.model.esm2.ESM2(
            shape.num_layers, shape.hidden_dim, shape.attention_heads, alphabet, shape.token_dropout
        )
        self._batch = alphabet.get_batch_converter()
        # Not strict: the language-model head is left out, since no vector passes through it.
        self._model.load_state_dict(_state(weights, shape, detection.regression), strict=False)
        self._model.eval()
        weights.refuse_if_changed()

    def needed_bytes(self, residues: int) -> int:
        """Return roughly how many bytes a sequence takes, the model not counted."""
        one_map = 4 * (residues + 2) ** 2
        layers = self._shape.num_layers * _STACKS_ALIVE if self._contacts else 0
        return one_map * self._shape.attention_heads * (_MAPS_ALIVE + layers)

    def compute(self, residues: str, layers: Iterable[int]) -> Reference:
        """Return what fair-esm computes from a sequence at `layers`."""
        _, _, tokens = self._batch([("", residues)])
        with torch.inference_mode():
            found = self._model(tokens, repr_layers=[*layers], return_contacts=self._contacts)
        hidden = {layer: one[0].numpy() for layer, one in found["representations"].items()}
        return Reference(hidden, found["contacts"][0].numpy() if self._contacts else None)


def _refuse_if_too_large(path: Path, shape: ModelShape) -> None:
    needed, available = 4 * shape.parameters, available_bytes(_CPU)
    if available is not None and needed > available:
        raise MachineError(
            f"{path}: {shape.parameters} parameters in float32 need "
            f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        )


def _state(
    weights: Weights, shape: ModelShape, regression: Regression | None
) -> dict[str, torch.Tensor]:
    """Return the tensors that fair-esm computes with, by its own names."""
    names = list(shape.trunk_shapes())
    names += [name for name in weights.tensors if name.endswith("rot_emb.inv_freq")]
    state = dict(weights.read(names))
    if regression is not None:
        state["contact_head.regression.weight"] = regression.weight.reshape(1, -1)
        state["contact_head.regression.bias"] = torch.tensor([regression.bias])
    return state
