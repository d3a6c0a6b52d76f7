"""The embedding trunk in weights: what the tensors' names, shapes and types tell of it."""

from __future__ import annotations

import re

from lib.errors import WeightsError
from lib.models.weights import Weights
from schema.esm2_config import ModelShape

__all__ = ["check_trunk", "shape_in_tensors", "trunk_dtype"]

_FAR_MORE_LAYERS_THAN_ANY_ESM2 = 1000
_ROTARY = re.compile(r"layers\.\d+\.self_attn\.rot_emb\.inv_freq")
# Heads, which work on the vectors of the last layer, and tables that rotary positions do without.
_BESIDE_THE_TRUNK = re.compile(
    r"(classifier|lm_head|pooler|qa_outputs|score)\..+"
    r"|contact_head\.regression\.(weight|bias)"
    r"|embeddings\.(position_ids|position_embeddings\.weight)"
)


def shape_in_tensors(weights: Weights) -> dict[str, int]:
    """Return the properties that tensor names and shapes show, by ModelShape's names.

    The number of heads shows only where rotary frequencies are stored. Raises WeightsError if
    the tensors are not those of an ESM-2 model.
    """
    hidden_dim = _hidden_dim(weights)
    shown = {"num_layers": _num_layers(weights), "hidden_dim": hidden_dim}
    rotary = weights.tensors.get("layers.0.self_attn.rot_emb.inv_freq")
    if rotary is not None:
        if len(rotary.shape) != 1 or 0 in rotary.shape or hidden_dim % (2 * rotary.shape[0]):
            raise WeightsError(
                f"{weights.path}: rot_emb.inv_freq has shape {rotary.shape}, which does not fit "
                f"the heads of any model of hidden_dim {hidden_dim}"
            )
        shown["attention_heads"] = hidden_dim // (2 * rotary.shape[0])
    return shown


def check_trunk(weights: Weights, shape: ModelShape) -> None:
    """Raise WeightsError unless every tensor of the trunk is there, in its shape, and no other."""
    if not shape.has_even_heads:
        raise WeightsError(
            f"hidden_dim {shape.hidden_dim} does not divide into {shape.attention_heads} heads "
            "of even width"
        )
    expected = shape.trunk_shapes()
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        raise WeightsError(f"{weights.path}: tensor {_listed(weights, missing)} missing")
    for name, dimensions in expected.items():
        if weights.tensors[name].shape != dimensions:
            raise WeightsError(
                f"{weights.path}: tensor {weights.stored_name(name)} has shape "
                f"{weights.tensors[name].shape}, an ESM-2 of hidden_dim {shape.hidden_dim} has "
                f"{dimensions}"
            )
    _refuse_unused(weights, shape)


def _refuse_unused(weights: Weights, shape: ModelShape) -> None:
    """Raise WeightsError for tensors that the network would leave out of a vector."""
    rotary = [name for name in weights.tensors if _ROTARY.fullmatch(name)]
    if len(rotary) not in (0, shape.num_layers):
        raise WeightsError(
            f"{weights.path}: {len(rotary)} of {shape.num_layers} layers have a tensor "
            "rot_emb.inv_freq"
        )
    others = weights.tensors.keys() - shape.trunk_shapes().keys() - {*rotary}
    unused = sorted(name for name in others if not _BESIDE_THE_TRUNK.fullmatch(name))
    if unused:
        raise WeightsError(
            f"{weights.path}: tensor {_listed(weights, unused)} not part of an ESM-2 model"
        )


def _listed(weights: Weights, names: list[str]) -> str:
    """Return the first name as it is stored, and how many follow."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{weights.stored_name(names[0])}{more}"


def trunk_dtype(weights: Weights, shape: ModelShape) -> str:
    """Return the type of a trunk's tensors; raises WeightsError if there are several, or others.

    The type is one of float32, float16 and bfloat16.
    """
    by_type: dict[str, list[str]] = {}
    for name in shape.trunk_shapes():
        by_type.setdefault(weights.tensors[name].dtype, []).append(name)
    rarest = min(by_type, key=lambda dtype: len(by_type[dtype]))
    named = _listed(weights, by_type[rarest])
    if len(by_type) > 1:
        raise WeightsError(
            f"{weights.path}: tensors of several types: {', '.join(sorted(by_type))}: {named} of "
            f"type {rarest}"
        )
    if rarest not in ("float32", "float16", "bfloat16"):
        raise WeightsError(f"{weights.path}: tensors of type {rarest}: {named}")
    return rarest


def _hidden_dim(weights: Weights) -> int:
    embedding = weights.tensors.get("embed_tokens.weight")
    if embedding is None:
        name = weights.stored_name("embed_tokens.weight")
        raise WeightsError(f"{weights.path}: no tensor {name}: not an ESM-2 model")
    if len(embedding.shape) != 2 or 0 in embedding.shape:
        raise WeightsError(f"{weights.path}: embed_tokens.weight has shape {embedding.shape}")
    return embedding.shape[1]


def _num_layers(weights: Weights) -> int:
    numbered = (re.match(r"layers\.(\d{1,9})\.", name) for name in weights.tensors)
    layers = {int(match[1]) for match in numbered if match}
    if not layers:
        raise WeightsError(f"{weights.path}: no tensors layers.N.*: not an ESM-2 model")
    if max(layers) >= _FAR_MORE_LAYERS_THAN_ANY_ESM2:
        raise WeightsError(f"{weights.path}: a tensor names layer {max(layers)}")
    return max(layers) + 1
