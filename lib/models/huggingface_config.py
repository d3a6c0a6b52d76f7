"""config.json of transformers' EsmConfig: what of it can change a vector is used or refused.

What each key does was measured with transformers 4.57.6 to 5.24.0: see
tests/data/saved_by_transformers/KEYS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import WeightsError
from lib.models.vocabulary import OF_SEQUENCES

__all__ = ["metadata", "refuse_other_models", "refuse_other_rotary", "unknown_keys"]

# What transformers calls the properties, in config.json.
_WORDS = {
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
_NORM_EPS = 1e-5
_NORM_EPS_IF_ABSENT = 1e-12
_ROTARY_BASE = 10000
# Any value but an empty one makes the network another one.
_REFUSED_IF_SET = {
    "is_decoder": "attention to earlier residues only",
    "add_cross_attention": "more layers",
    "pruned_heads": "fewer heads",
    "quantization_config": "other numbers than the tensors hold",
    "per_layer_config": "other layers than ESM-2 has",
}
# Keys that are read above or below, or that the tensors' shapes are checked against.
_READ = {
    *_WORDS.values(),
    *_REFUSED_IF_SET,
    "emb_layer_norm_before",
    "head_dim",
    "is_folding_model",
    "layer_norm_eps",
    "mask_token_id",
    "model_type",
    "position_embedding_type",
    "rope_theta",
    "transformers_weights",
    "untrained",  # scripts/make_model.py writes it
}
# Keys that change no vector of a sequence by itself, in a trunk with rotary positions.
_HARMLESS = {
    # Where the model comes from.
    "_name_or_path", "architectures", "tokenizer_class", "torch_dtype", "dtype",
    "transformers_version", "model_name",
    # Sizes that the tensors show; the length that rotary positions do not have.
    "intermediate_size", "vocab_size", "max_position_embeddings",
    # ESM's network has GELU and ignores these.
    "hidden_act", "rope_parameters", "rope_scaling", "partial_rotary_factor",
    # Training.
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    "initializer_range", "gradient_checkpointing", "problem_type", "finetuning_task",
    # Only without is_decoder, which is refused.
    "is_causal", "is_encoder_decoder", "cross_attention_hidden_size", "tie_encoder_decoder",
    "use_cache",
    # Heads.
    "id2label", "label2id", "num_labels", "tie_word_embeddings", "esmfold_config", "vocab_list",
    # Tokens: ESM-2's alphabet is fixed, and sequences are not padded.
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id",
    "decoder_start_token_id", "prefix",
    # How a computation is done, or what it returns.
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
    "torchscript", "tf_legacy_loss", "use_bfloat16",
    # Generation of text.
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the properties that a config.json states, by the names of ModelShape's fields.

    Without a word of it, transformers does not scale embeddings by token dropout.
    """
    said = {"token_dropout": False, **config}
    return {key: said[word] for key, word in _WORDS.items() if word in said}


def unknown_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of which it is not known whether they change a vector."""
    return tuple(sorted(config.keys() - _READ - _HARMLESS))


def refuse_other_models(config: Mapping[str, Any], folder: Path) -> None:
    """Raise WeightsError if a config.json describes another network than ESM-2's."""
    if config.get("model_type") != "esm":
        raise WeightsError(f"{folder}: model_type {config.get('model_type')!r}, not 'esm'")
    if config.get("is_folding_model"):
        raise WeightsError(f"{folder}: an ESMFold model (is_folding_model), not ESM-2")
    if config.get("position_embedding_type") != "rotary":
        raise WeightsError(
            f"{folder}: position_embedding_type {config.get('position_embedding_type')!r}: "
            "ESM-2 has 'rotary'"
        )
    if config.get("emb_layer_norm_before"):
        raise WeightsError(f"{folder}: emb_layer_norm_before is set: ESM-1b or ESM-1v, not ESM-2")
    for key, meaning in _REFUSED_IF_SET.items():
        if config.get(key):
            raise WeightsError(f"{folder}: {key} {_shown(config[key])}: {meaning}, not ESM-2")
    if config.get("transformers_weights"):
        named = _shown(config["transformers_weights"])
        raise WeightsError(f"{folder}: transformers_weights {named}: a file of another name")
    _refuse_other_norms(config, folder)
    _refuse_other_masks(config, folder)


def refuse_other_rotary(config: Mapping[str, Any], folder: Path) -> None:
    """Raise WeightsError if keys give other rotary frequencies than ESM-2's.

    They count only where no frequencies are stored, and not in every version of transformers.
    """
    theta = config.get("rope_theta", _ROTARY_BASE)
    if theta != _ROTARY_BASE:
        raise WeightsError(
            f"{folder}: rope_theta {_shown(theta)} without a tensor inv_freq: ESM-2 has "
            f"{_ROTARY_BASE}"
        )
    head_dim, heads = config.get("head_dim"), config.get("num_attention_heads")
    numbers = isinstance(head_dim, int) and isinstance(heads, int)
    if head_dim is not None and not (numbers and head_dim * heads == config.get("hidden_size")):
        raise WeightsError(
            f"{folder}: head_dim {_shown(head_dim)} without a tensor inv_freq: ESM-2 has "
            "hidden_size / num_attention_heads"
        )


def _refuse_other_norms(config: Mapping[str, Any], folder: Path) -> None:
    if "layer_norm_eps" not in config:
        raise WeightsError(
            f"{folder}: layer_norm_eps is absent, which means {_NORM_EPS_IF_ABSENT!r}: ESM-2 has "
            f"{_NORM_EPS!r}"
        )
    eps = config["layer_norm_eps"]
    if eps != _NORM_EPS:
        raise WeightsError(f"{folder}: layer_norm_eps {_shown(eps)}: ESM-2 has {_NORM_EPS!r}")


def _refuse_other_masks(config: Mapping[str, Any], folder: Path) -> None:
    mask = config.get("mask_token_id")
    if not config.get("token_dropout"):
        return
    if not isinstance(mask, int) or isinstance(mask, bool):
        raise WeightsError(f"{folder}: mask_token_id {_shown(mask)} with token_dropout")
    # transformers zeroes the embedding of this token.
    if mask in OF_SEQUENCES:
        raise WeightsError(
            f"{folder}: mask_token_id {mask} with token_dropout: a token that sequences hold; "
            "ESM-2 has 32"
        )


def _shown(value: object) -> str:
    return repr(value)[:80]
