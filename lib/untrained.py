"""Untrained ESM-2 weights in fair-esm's release format, for trials without a download.

They carry outlier channels, as trained transformers do: without them, rounding errors look
milder than they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.catalog import VOCABULARY, trunk_shapes
from lib.errors import MachineError, SettingsError

__all__ = ["make_model"]

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
    if min(num_layers, hidden_dim, attention_heads) < 1 or hidden_dim % (2 * attention_heads):
        raise SettingsError(
            f"{num_layers} layers, hidden_dim {hidden_dim}, {attention_heads} heads: all must be "
            "positive, and hidden_dim divide into heads of even width"
        )
    regression = path.with_name(f"{path.stem}-contact-regression.pt")
    for file in (path, regression):
        if file.exists():
            raise SettingsError(f"{file}: exists already")
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: tensor.to(dtype)
        for name, tensor in _tensors(num_layers, hidden_dim, attention_heads, generator)
    }
    state["encoder.lm_head.weight"] = state["encoder.sentence_encoder.embed_tokens.weight"]
    cfg = argparse.Namespace(
        arch="esm2",
        encoder_layers=num_layers,
        encoder_embed_dim=hidden_dim,
        encoder_attention_heads=attention_heads,
        encoder_ffn_embed_dim=4 * hidden_dim,
        token_dropout=token_dropout,
        untrained=True,
    )
    weight = torch.randn(1, num_layers * attention_heads, generator=generator)
    contact = {
        "contact_head.regression.weight": weight,
        "contact_head.regression.bias": torch.zeros(1),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"cfg": {"model": cfg}, "model": state}, path)
        torch.save({"model": contact}, regression)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of several lines.
        path.unlink(missing_ok=True)
        fact = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise MachineError(f"{path}: {fact}") from None
    return regression


def _tensors(
    num_layers: int, hidden_dim: int, attention_heads: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    d = hidden_dim
    outliers = torch.randperm(d, generator=generator)[: min(_OUTLIER_CHANNELS, d // 8)]
    for name, shape in trunk_shapes(num_layers, d).items():
        yield f"encoder.sentence_encoder.{name}", _draw(name, shape, outliers, generator)
        if name.endswith("out_proj.bias"):
            head_dim = d // attention_heads
            inv_freq = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
            rotary = name.replace("out_proj.bias", "rot_emb.inv_freq")
            yield f"encoder.sentence_encoder.{rotary}", inv_freq
    yield "encoder.lm_head.bias", torch.zeros(VOCABULARY)
    yield "encoder.lm_head.dense.weight", torch.randn(d, d, generator=generator) / d**0.5
    yield "encoder.lm_head.dense.bias", torch.zeros(d)
    yield "encoder.lm_head.layer_norm.weight", torch.ones(d)
    yield "encoder.lm_head.layer_norm.bias", torch.zeros(d)


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
