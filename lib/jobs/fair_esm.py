"""fair-esm's own model with the weights in hand: the reference that a run is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import esm
import numpy as np
import numpy.typing as npt
import torch

from lib.catalog import trunk_shapes
from lib.errors import MachineError
from lib.models.detection import Detection
from lib.network.memory import available_bytes

__all__ = ["FairEsm", "Reference"]

_CPU = torch.device("cpu")
# Attention of all heads is held as scores, as probabilities and as a copy; for contacts, that of
# all layers as made, stacked, without <eos>, as a copy, made symmetric and corrected.
_MAPS_ALIVE = 3
_STACKS_ALIVE = 6

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What fair-esm computes of a sequence.

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
        weights = detection.weights
        assert weights is not None
        self._layers = detection.value("num_layers")
        self._heads = detection.value("attention_heads")
        self._contacts = detection.regression is not None
        needed, available = 4 * detection.value("parameters"), available_bytes(_CPU)
        if available is not None and needed > available:
            raise MachineError(
                f"{weights.path}: {detection.value('parameters')} parameters in float32 need "
                f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
            )
        width = detection.value("hidden_dim")
        dropout = bool(detection.properties["token_dropout"].value)
        alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
        self._model = esm.model.esm2.ESM2(self._layers, width, self._heads, alphabet, dropout)
        self._batch = alphabet.get_batch_converter()
        names = [*trunk_shapes(self._layers, width)]
        names += [name for name in weights.tensors if name.endswith("rot_emb.inv_freq")]
        state = dict(weights.read(names))
        if detection.regression is not None:
            weight, bias = detection.regression.weight, detection.regression.bias
            state["contact_head.regression.weight"] = weight.reshape(1, -1)
            state["contact_head.regression.bias"] = torch.tensor([bias])
        # Without the language-model head, which no vector goes through.
        self._model.load_state_dict(state, strict=False)
        self._model.eval()
        weights.refuse_if_changed()

    def needed_bytes(self, residues: int) -> int:
        """Return about how much memory a sequence takes beside the model."""
        one_map = 4 * (residues + 2) ** 2
        layers = self._layers * _STACKS_ALIVE if self._contacts else 0
        return one_map * self._heads * (_MAPS_ALIVE + layers)

    def compute(self, residues: str, layers: Iterable[int]) -> Reference:
        """Return what fair-esm computes of a sequence at `layers`."""
        _, _, tokens = self._batch([("", residues)])
        with torch.inference_mode():
            found = self._model(tokens, repr_layers=[*layers], return_contacts=self._contacts)
        hidden = {layer: one[0].numpy() for layer, one in found["representations"].items()}
        return Reference(hidden, found["contacts"][0].numpy() if self._contacts else None)
