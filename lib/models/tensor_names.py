"""Tensor names: the ones that fair-esm and transformers give to the same tensor of ESM-2."""

from __future__ import annotations

import re

__all__ = ["fair_esm_name", "hugging_face_name"]

_TO_FAIR_ESM = [
    (r"^esm\.", ""),
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


def fair_esm_name(stored: str) -> str:
    """Return the name that fair-esm gives to a tensor that transformers names `stored`."""
    return _renamed(stored, _TO_FAIR_ESM)


def hugging_face_name(name: str) -> str:
    """Return the name that transformers' EsmForMaskedLM gives to fair-esm's tensor `name`."""
    return _renamed(name, _TO_HUGGING_FACE)


def _renamed(name: str, replacements: list[tuple[str, str]]) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name
