"""Untrained ESM-2 weights in the formats of releases, for trials without a download.

They have outlier channels, as trained transformers do: without them, rounding errors would look
smaller than they are.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.errors import MachineError, SettingsError
from lib.files import disk_errors, new_path
from lib.models.regression import regression_path
from lib.models.tensor_names import hugging_face_name
from schema.esm2_config import VOCABULARY, ModelShape

__all__ = ["make_folder", "make_model"]

# Of layers, hidden_dim and heads: no ESM-2 comes near, so that more is a slip of the pen.
_LARGEST = 1 << 16
_OUTLIER_CHANNELS = 4


def make_model(
    path: Path,
    num_layers: int,
    hidden_dim: int,
    attention_heads: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    token_dropout: bool = True,
) -> Path:
    """Write an untrained model to `path` and its contact regression beside it.

    The file has the keys and tensor names of a release (cfg Namespace, `encoder.` prefixes,
    language-model head, rotary buffers) and the mark `untrained` in its cfg. Returns the path
    of the contact regression. One of the same bytes may be there, as an interruption between the
    two files leaves it. Raises SettingsError for a shape that no ESM-2 can have and for a file
    that exists, MachineError if the disk fails.
    """
    shape = ModelShape(num_layers, hidden_dim, attention_heads, token_dropout)
    _check_shape(shape)
    regression = regression_path(path)
    _make_parents(path)
    drawn = io.BytesIO()

    def is_the_same(found: Path) -> bool:
        return not drawn.getvalue() or found.read_bytes() == drawn.getvalue()

    with (
        new_path(path, folder=False) as model_part,
        new_path(regression, folder=False, replaceable=is_the_same) as regression_part,
    ):
        trunk, contact = _drawn(shape, seed, dtype)
        state = {
            f"encoder.{'' if 'lm_head' in name else 'sentence_encoder.'}{name}": tensor
            for name, tensor in trunk.items()
        }
        state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
        _save({"cfg": {"model": _fair_esm_cfg(shape)}, "model": state}, model_part, path)
        torch.save({"model": contact}, drawn)
        regression_part.write_bytes(drawn.getvalue())
    return regression


def make_folder(
    folder: Path,
    num_layers: int,
    hidden_dim: int,
    attention_heads: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    token_dropout: bool = True,
) -> Path:
    """Write the untrained model that `make_model` draws from `seed` as a Hugging Face folder.

    config.json has the keys of transformers' EsmForMaskedLM and the mark `untrained`.
    model.safetensors has its tensor names, and holds the contact regression too. Returns the file
    of weights. Raises as `make_model` does.
    """
    shape = ModelShape(num_layers, hidden_dim, attention_heads, token_dropout)
    _check_shape(shape)
    _make_parents(folder)
    name = "model.safetensors"
    with new_path(folder, folder=True) as part:
        trunk, contact = _drawn(shape, seed, dtype)
        state = {hugging_face_name(key): tensor for key, tensor in (trunk | contact).items()}
        try:
            save_file(state, part / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise MachineError(f"{folder}: {error}") from None
        config = json.dumps(_hugging_face_config(shape, dtype), indent=2)
        (part / "config.json").write_text(config + "\n")
    return folder / name


def _fair_esm_cfg(shape: ModelShape) -> argparse.Namespace:
    return argparse.Namespace(
        arch="esm2",
        encoder_layers=shape.num_layers,
        encoder_embed_dim=shape.hidden_dim,
        encoder_attention_heads=shape.attention_heads,
        encoder_ffn_embed_dim=4 * shape.hidden_dim,
        token_dropout=shape.token_dropout,
        untrained=True,
    )


def _hugging_face_config(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_dim,
        "num_attention_heads": shape.attention_heads,
        "intermediate_size": 4 * shape.hidden_dim,
        "token_dropout": shape.token_dropout,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "is_folding_model": False,
        "vocab_size": VOCABULARY,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        "untrained": True,
    }


def _make_parents(path: Path) -> None:
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # what mkdir raises if a file is in a folder's place
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def _save(content: dict[str, Any], part: Path, path: Path) -> None:
    """Write `content` to `part`, which becomes `path`; the bytes do not depend on either name."""
    try:
        with part.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # its message has several lines if the disk is full
        raise MachineError(f"{path}: {str(error).splitlines()[0]}") from None


def _check_shape(shape: ModelShape) -> None:
    sizes = shape.num_layers, shape.hidden_dim, shape.attention_heads
    if min(sizes) < 1 or max(sizes) > _LARGEST or not shape.has_even_heads:
        raise SettingsError(
            f"{shape.num_layers} layers, hidden_dim {shape.hidden_dim}, {shape.attention_heads} "
            f"heads: all must be from 1 to {_LARGEST}, and hidden_dim must divide into heads of "
            "even width"
        )


def _drawn(
    shape: ModelShape, seed: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the model and its contact regression (always float32), by fair-esm's names."""
    generator = torch.Generator().manual_seed(seed)
    trunk = {name: tensor.to(dtype) for name, tensor in _tensors(shape, generator)}
    maps = shape.num_layers * shape.attention_heads
    contact = {
        "contact_head.regression.weight": torch.randn(1, maps, generator=generator),
        "contact_head.regression.bias": torch.zeros(1),
    }
    return trunk, contact


def _tensors(shape: ModelShape, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    d = shape.hidden_dim
    outliers = torch.randperm(d, generator=generator)[: min(_OUTLIER_CHANNELS, d // 8)]
    for name, dimensions in shape.trunk_shapes().items():
        yield name, _draw(name, dimensions, outliers, generator)
        if name.endswith("out_proj.bias"):
            steps = torch.arange(0, shape.head_dim, 2).float()
            inv_freq = 1.0 / (10000 ** (steps / shape.head_dim))
            yield name.replace("out_proj.bias", "rot_emb.inv_freq"), inv_freq
    yield "lm_head.bias", torch.zeros(VOCABULARY)
    yield "lm_head.dense.weight", torch.randn(d, d, generator=generator) / d**0.5
    yield "lm_head.dense.bias", torch.zeros(d)
    yield "lm_head.layer_norm.weight", torch.ones(d)
    yield "lm_head.layer_norm.bias", torch.zeros(d)


def _draw(
    name: str, shape: tuple[int, ...], outliers: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw a tensor so that the output of layers keeps its size and attention is not uniform."""
    tensor = torch.empty(shape).normal_(generator=generator)
    if name.endswith("norm.weight"):
        tensor.mul_(0.2).add_(1.0)
        # Trained norms damp the channels that trained layers amplify.
        tensor[outliers] *= 0.1
    elif name.endswith("emb_layer_norm_after.weight"):
        tensor.mul_(0.2).add_(1.0)
    elif name.endswith("bias"):
        tensor.mul_(0.1)
        if name.endswith(("layers.0.fc2.bias", "layers.1.fc2.bias")):
            tensor[outliers] = tensor[outliers].sign() * 60.0
    elif name != "embed_tokens.weight":
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        tensor.mul_(gain / shape[1] ** 0.5)
        if name.endswith("fc2.weight"):
            tensor[outliers] *= 8.0
    return tensor
