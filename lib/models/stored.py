"""Stored tensors: the file that holds each, and what it is called there, by fair-esm's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import WeightsError
from lib.models.held_file import HeldFile
from lib.models.weights import TensorInfo

__all__ = ["ROTARY", "StoredTensor", "with_rotary_of_every_layer"]

ROTARY = "self_attn.rot_emb.inv_freq"
# Rotary frequencies of all layers, by what fair_esm_name makes of transformers' names.
_SHARED_ROTARY = (f"layers.*.{ROTARY}", "rot_emb.inv_freq")


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: its file, and its name there."""

    file: HeldFile
    name: str
    info: TensorInfo


def with_rotary_of_every_layer(
    stored: dict[str, StoredTensor], path: Path
) -> dict[str, StoredTensor]:
    """Put rotary frequencies that are stored once in the place of those of every layer.

    Raises WeightsError if other frequencies are stored beside them.
    """
    rotary = [name for name in stored if name.endswith("rot_emb.inv_freq")]
    shared = [name for name in rotary if name in _SHARED_ROTARY]
    if not shared:
        return stored
    if len(rotary) > 1:
        other = next(name for name in rotary if name != shared[0])
        raise WeightsError(
            f"{path}: two tensors are rotary frequencies: {stored[shared[0]].name} and "
            f"{stored[other].name}"
        )
    once = stored.pop(shared[0])
    numbered = (re.match(r"layers\.(\d+)\.", name) for name in stored)
    layers = sorted({int(match[1]) for match in numbered if match})
    return stored | {f"layers.{layer}.{ROTARY}": once for layer in layers}
