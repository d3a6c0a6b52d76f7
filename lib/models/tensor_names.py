"""Tensor names: the ones that fair-esm and transformers give to the same tensor of ESM-2."""

from __future__ import annotations

import re

__all__ = ["HEADS", "fair_esm_name", "hugging_face_name", "is_of_trunk"]

_TO_FAIR_ESM = [
    (r"^esm\.", ""),
    (r"(^|\.)LayerNorm\.gamma$", r"\1LayerNorm.weight"),
    (r"(^|\.)LayerNorm\.beta$", r"\1LayerNorm.bias"),
    # From 5.6 on, the frequencies of all layers are one tensor: of the model in its state dict, of
    # a layer `*` where transformers saves it.
    (r"^rotary_embeddings\.inv_freq$", "rot_emb.inv_freq"),
    (r"^embeddings\.word_embeddings\.", "embed_tokens."),
    (r"^encoder\.emb_layer_norm_after\.", "emb_layer_norm_after."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.query\.", ".self_attn.q_proj."),
    (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.self\.value\.", ".self_attn.v_proj."),
    (r"\.attention\.self\.rotary_embeddings\.", ".self_attn.rot_emb."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.LayerNorm\.", ".self_attn_layer_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"^(layers\.\d+)\.LayerNorm\.", r"\1.final_layer_norm."),
]
# Only for what fair-esm has as well; the order matters.
_TO_HUGGING_FACE = [
    (r"^lm_head\.weight$", "lm_head.decoder.weight"),
    (r"^embed_tokens\.", "esm.embeddings.word_embeddings."),
    (r"^emb_layer_norm_after\.", "esm.encoder.emb_layer_norm_after."),
    (r"^contact_head\.", "esm.contact_head."),
    (r"^layers\.", "esm.encoder.layer."),
    (r"\.self_attn\.q_proj\.", ".attention.self.query."),
    (r"\.self_attn\.k_proj\.", ".attention.self.key."),
    (r"\.self_attn\.v_proj\.", ".attention.self.value."),
    (r"\.self_attn\.rot_emb\.", ".attention.self.rotary_embeddings."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn_layer_norm\.", ".attention.LayerNorm."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"\.final_layer_norm\.", ".LayerNorm."),
]
# Modules of a model's head; the embedding trunk has none of these names.
HEADS = frozenset({"classifier", "contact_head", "lm_head", "pooler", "qa_outputs", "score"})
# First parts of names, by fair-esm and by transformers, where they do not belong to a head.
_TRUNK = {
    "embed_tokens",
    "embeddings",
    "emb_layer_norm_after",
    "emb_layer_norm_before",
    "encoder",
    "esm",
    "layers",
    "rot_emb",
    "rotary_embeddings",
}


def fair_esm_name(stored: str) -> str:
    """Return the name that fair-esm gives to a tensor that transformers names `stored`."""
    return _renamed(stored, _TO_FAIR_ESM)


def hugging_face_name(name: str) -> str:
    """Return the name that transformers' EsmForMaskedLM gives to fair-esm's tensor `name`."""
    return _renamed(name, _TO_HUGGING_FACE)


def is_of_trunk(name: str) -> bool:
    """Return whether `fair_esm_name` gives this name to a part of the trunk, known or not."""
    return name.partition(".")[0] in _TRUNK


def _renamed(name: str, replacements: list[tuple[str, str]]) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name
