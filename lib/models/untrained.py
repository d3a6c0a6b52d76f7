"""Untrained ESM-2 weights in the formats of releases, for trials without a download.

They carry outlier channels, as trained transformers do: without them, rounding errors look
milder than they are.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.catalog import VOCABULARY, trunk_shapes
from lib.errors import MachineError, SettingsError
from lib.files import disk_errors, new_path
from lib.models.huggingface import hugging_face_name

__all__ = ["make_folder", "make_model"]

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
    of the contact regression. Raises SettingsError for a shape that no ESM-2 can have and for a
    file that exists, MachineError if the disk fails.
    """
    _check_shape(num_layers, hidden_dim, attention_heads)
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    _make_parents(path)
    cfg = argparse.Namespace(
        arch="esm2",
        encoder_layers=num_layers,
        encoder_embed_dim=hidden_dim,
        encoder_attention_heads=attention_heads,
        encoder_ffn_embed_dim=4 * hidden_dim,
        token_dropout=token_dropout,
        untrained=True,
    )
    with (
        new_path(path, folder=False) as model_part,
        new_path(regression, folder=False) as regression_part,
    ):
        trunk, contact = _drawn(num_layers, hidden_dim, attention_heads, seed, dtype)
        state = {
            f"encoder.{'' if 'lm_head' in name else 'sentence_encoder.'}{name}": tensor
            for name, tensor in trunk.items()
        }
        state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
        _save({"cfg": {"model": cfg}, "model": state}, model_part, path)
        _save({"model": contact}, regression_part, regression)
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

    config.json has transformers' words of an EsmForMaskedLM and the mark `untrained`;
    model.safetensors has its tensor names, the contact regression among them. Returns the file of
    weights. Raises as make_model does.
    """
    _check_shape(num_layers, hidden_dim, attention_heads)
    _make_parents(folder)
    config = {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_dim,
        "num_attention_heads": attention_heads,
        "intermediate_size": 4 * hidden_dim,
        "token_dropout": token_dropout,
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
    name = "model.safetensors"
    with new_path(folder, folder=True) as part:
        trunk, contact = _drawn(num_layers, hidden_dim, attention_heads, seed, dtype)
        state = {hugging_face_name(key): tensor for key, tensor in (trunk | contact).items()}
        try:
            save_file(state, part / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise MachineError(f"{folder}: {error}") from None
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder / name


def _make_parents(path: Path) -> None:
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # mkdir's word for a file in a folder's place
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def _save(content: dict[str, Any], part: Path, path: Path) -> None:
    """Write `content` to `part`, which becomes `path`; its bytes do not depend on its name."""
    try:
        with part.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # of several lines, where a disk is full
        raise MachineError(f"{path}: {str(error).splitlines()[0]}") from None


def _check_shape(num_layers: int, hidden_dim: int, attention_heads: int) -> None:
    if min(num_layers, hidden_dim, attention_heads) < 1 or hidden_dim % (2 * attention_heads):
        raise SettingsError(
            f"{num_layers} layers, hidden_dim {hidden_dim}, {attention_heads} heads: all must be "
            "positive, and hidden_dim divide into heads of even width"
        )


def _drawn(
    num_layers: int, hidden_dim: int, attention_heads: int, seed: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the model and its contact regression (always float32), by fair-esm's names."""
    generator = torch.Generator().manual_seed(seed)
    trunk = {
        name: tensor.to(dtype)
        for name, tensor in _tensors(num_layers, hidden_dim, attention_heads, generator)
    }
    contact = {
        "contact_head.regression.weight": torch.randn(
            1, num_layers * attention_heads, generator=generator
        ),
        "contact_head.regression.bias": torch.zeros(1),
    }
    return trunk, contact


def _tensors(
    num_layers: int, hidden_dim: int, attention_heads: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    d = hidden_dim
    outliers = torch.randperm(d, generator=generator)[: min(_OUTLIER_CHANNELS, d // 8)]
    for name, shape in trunk_shapes(num_layers, d).items():
        yield name, _draw(name, shape, outliers, generator)
        if name.endswith("out_proj.bias"):
            head_dim = d // attention_heads
            inv_freq = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
            rotary = name.replace("out_proj.bias", "rot_emb.inv_freq")
            yield rotary, inv_freq
    yield "lm_head.bias", torch.zeros(VOCABULARY)
    yield "lm_head.dense.weight", torch.randn(d, d, generator=generator) / d**0.5
    yield "lm_head.dense.bias", torch.zeros(d)
    yield "lm_head.layer_norm.weight", torch.ones(d)
    yield "lm_head.layer_norm.bias", torch.zeros(d)


def _draw(
    name: str, shape: tuple[int, ...], outliers: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw one tensor so that layers neither vanish nor blow up and attention is not uniform."""
    tensor = torch.empty(shape).normal_(generator=generator)
    if name.endswith("norm.weight"):
        tensor.mul_(0.2).add_(1.0)
        # Trained norms damp the channels that trained layers blow up.
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
