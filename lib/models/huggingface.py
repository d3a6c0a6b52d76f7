"""Hugging Face folders of ESM-2: config.json beside its weights, under transformers' names.

Weights are model.safetensors or pytorch_model.bin (what torch.save makes of a state dict), whole
or in shards with an index. Where a folder has both, safetensors are read, as by transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lib.errors import WeightsError
from lib.files import file_sha256, listing_sha256
from lib.models.torch_archive import TensorInfo, load_archive, refuse_inflated, tensor_info

__all__ = [
    "fair_esm_name",
    "folder_sha256",
    "hugging_face_name",
    "read_json",
    "read_metadata",
    "read_tensors",
    "stored_tensors",
    "tensors_of",
]

# transformers' words for the properties, in config.json.
_CONFIG_WORDS = {
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LAYER_NORM_EPS = 1e-5
_RENAMES = [
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
# The way back, for what fair-esm has as well; order matters.
_RENAMES_BACK = [
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


def read_metadata(folder: Path) -> tuple[dict[str, object], dict[str, TensorInfo], bool]:
    """Return what config.json says, what is stored by fair-esm's names, and whether untrained.

    Raises WeightsError for a folder that is not an ESM-2 model.
    """
    config = read_json(folder / "config.json")
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
    eps = config.get("layer_norm_eps", _LAYER_NORM_EPS)
    if eps != _LAYER_NORM_EPS:
        raise WeightsError(f"{folder}: layer_norm_eps {eps!r}: ESM-2 has {_LAYER_NORM_EPS!r}")
    tensors: dict[str, TensorInfo] = {}
    for file in _files(folder):
        for stored, info in stored_tensors(file).items():
            name = fair_esm_name(stored)
            if name in tensors:
                raise WeightsError(f"{file}: two tensors are {name}, the second {stored}")
            tensors[name] = info
    metadata = {key: config[word] for key, word in _CONFIG_WORDS.items() if word in config}
    return metadata, tensors, config.get("untrained") is True


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (fair-esm name, tensor) for each of `names`."""
    wanted = set(names)
    for file in _files(folder):
        for stored, tensor in tensors_of(file, lambda stored: fair_esm_name(stored) in wanted):
            yield fair_esm_name(stored), tensor


def stored_tensors(file: Path) -> dict[str, TensorInfo]:
    """Return type and shape of every tensor of a .safetensors or .bin file, by stored name.

    Raises WeightsError for a file that is neither.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                # A safetensors handle is no mapping.
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: TensorInfo(
                        _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
                    )
                    for name, part in parts.items()
                }
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: {' '.join(str(error).split())}") from None
    state = _state_dict(file)
    refuse_inflated({fair_esm_name(name): tensor for name, tensor in state.items()}, file)
    return {name: tensor_info(name, tensor, file) for name, tensor in state.items()}


def tensors_of(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (stored name, tensor) of a file for every name that is `wanted`."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for stored in filter(wanted, opened.keys()):
                yield stored, opened.get_tensor(stored)
    else:
        state = _state_dict(file)
        yield from ((stored, state[stored]) for stored in filter(wanted, state))


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of what `sha256sum` prints for config.json and what is read."""
    paths = [folder / "config.json", *_files(folder)]
    return listing_sha256((file_sha256(path), path.name) for path in paths)


def fair_esm_name(stored: str) -> str:
    """Return the name that fair-esm gives to a tensor that transformers names `stored`."""
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored


def hugging_face_name(name: str) -> str:
    """Return the name that transformers' EsmForMaskedLM gives to fair-esm's tensor `name`."""
    for pattern, replacement in _RENAMES_BACK:
        name = re.sub(pattern, replacement, name)
    return name


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    state = load_archive(file)
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise WeightsError(f"{file}: holds no tensors")
    return tensors


def _files(folder: Path) -> list[Path]:
    """Return the files of weights that are read: the shards an index names, or the single one."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            return _shards(folder, index, Path(single).suffix)
        if (folder / single).is_file():
            return [folder / single]
    raise WeightsError(
        f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards"
    )


def _shards(folder: Path, index: Path, suffix: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: names {name!r}, which is not a file of the folder")
        if Path(name).suffix != suffix:
            raise WeightsError(f"{index}: names {name!r}, which is no {suffix} file")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raises WeightsError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WeightsError(f"{path}: not JSON") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content
