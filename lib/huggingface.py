"""Hugging Face folders of ESM-2: config.json beside safetensors, under transformers' names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lib.digest import file_sha256
from lib.errors import WeightsError

__all__ = ["fair_esm_name", "folder_sha256", "read_metadata", "read_tensors"]

# transformers' words for the properties, in config.json.
_CONFIG_WORDS = {
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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


def read_metadata(
    folder: Path,
) -> tuple[dict[str, object], dict[str, tuple[str, tuple[int, ...]]], bool]:
    """Return what config.json says, the stored tensors (dtype, shape), and whether untrained.

    Raises WeightsError for a folder that is not an ESM-2 model with safetensors.
    """
    config = _read_json(folder / "config.json")
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
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in _safetensors(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 (a safetensors handle, no mapping)
                    part = opened.get_slice(stored)
                    dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
                    tensors[fair_esm_name(stored)] = (dtype, tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file}: {' '.join(str(error).split())}") from None
    metadata = {key: config[word] for key, word in _CONFIG_WORDS.items() if word in config}
    return metadata, tensors, config.get("untrained") is True


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (fair-esm name, tensor) for each of `names`."""
    wanted = set(names)
    for file in _safetensors(folder):
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118
                name = fair_esm_name(stored)
                if name in wanted:
                    yield name, opened.get_tensor(stored)


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of what `sha256sum` prints for config.json and the safetensors files."""
    listing = hashlib.sha256()
    for path in [folder / "config.json", *_safetensors(folder)]:
        listing.update(f"{file_sha256(path)}  {path.name}\n".encode())
    return listing.hexdigest()


def fair_esm_name(stored: str) -> str:
    """Return the name that fair-esm gives to a tensor that transformers names `stored`."""
    for pattern, replacement in _RENAMES:
        stored = re.sub(pattern, replacement, stored)
    return stored


def _safetensors(folder: Path) -> list[Path]:
    """Return the folder's safetensors files: the shards its index names, or the single one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise WeightsError(f"{folder}: no model.safetensors and no index of shards")
        return [single]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: names {name!r}, which is not a file of the folder")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
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
