"""The ESM-2 network for inference, over packs without padding.

The architecture is that of fair-esm 2.0.0's esm/model/esm2.py (Lin et al. 2022): token embedding
scaled as in training with token dropout, pre-norm layers with rotary positions and exact GELU,
and a final layer norm on the last layer only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from lib.catalog import trunk_shapes
from lib.errors import WeightsError
from lib.packing import Group, group_equal_lengths
from lib.weights import Weights
from schema.esm2_config import ESM2Config

__all__ = ["Network", "load_network"]

# With token dropout 15 % of the tokens were chosen in training and 80 % of those masked.
_UNMASKED = 1 - 0.15 * 0.8
_NORM_EPS = 1e-5
_TENSORS_PER_MAPPING = 32


@dataclass
class _Layer:
    """Tensors of one transformer layer; q, k and v stand in one (3 * hidden_dim, hidden_dim)."""

    attention_norm: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    ffn_norm: tuple[torch.Tensor, torch.Tensor]
    fc1: tuple[torch.Tensor, torch.Tensor]
    fc2: tuple[torch.Tensor, torch.Tensor]


class Network:
    """An ESM-2 trunk whose weights are in memory; made by `load_network`."""

    def __init__(
        self,
        config: ESM2Config,
        embedding: torch.Tensor,
        layers: list[_Layer],
        final_norm: tuple[torch.Tensor, torch.Tensor],
        inv_freq: torch.Tensor,
    ) -> None:
        self.config = config
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._inv_freq = inv_freq

    def forward(
        self, tokens: torch.Tensor, lengths: Sequence[int], repr_layers: Iterable[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (layer, (tokens, hidden_dim) float32) for each of `repr_layers`, ascending.

        tokens: (T,) of sequences end to end, each with <cls> and <eos>; lengths: (N,) residues
        per sequence. What is yielded is overwritten when the next layer is asked for, and
        layers after the last one wanted are not computed.
        """
        wanted = set(repr_layers)
        groups = group_equal_lengths(lengths)
        x = F.embedding(tokens.to(self.device, torch.long), self._embedding)
        if self.config.token_dropout:
            x *= _UNMASKED
        if 0 in wanted:
            yield 0, x
        cos, sin = self._rotary(groups)
        for number, layer in enumerate(self._layers[: max(wanted)], start=1):
            x += self._attention(layer, x, groups, cos, sin)
            x += _feed_forward(layer, x)
            if number == self.config.num_layers:
                x = _norm(x, self._final_norm)
            if number in wanted:
                yield number, x

    def _rotary(self, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of every token's position, (T, 1, head_dim) float32."""
        longest = max(group.tokens for group in groups)
        positions = torch.arange(longest, device=self.device, dtype=torch.float32)
        angles = torch.outer(positions, self._inv_freq)
        table = torch.cat((angles, angles), dim=-1)
        rows = torch.cat(
            [torch.arange(group.tokens, device=self.device).repeat(group.count) for group in groups]
        )
        return table.cos()[rows].unsqueeze(1), table.sin()[rows].unsqueeze(1)

    def _attention(
        self,
        layer: _Layer,
        x: torch.Tensor,
        groups: Sequence[Group],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        tokens, width = x.shape
        heads = self.config.attention_heads
        qkv = F.linear(_norm(x, layer.attention_norm), *layer.qkv)
        q, k, v = qkv.view(tokens, 3, heads, width // heads).unbind(1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = torch.empty_like(q)
        for group in groups:
            place = slice(group.start, group.stop)
            shape = (group.count, group.tokens, heads, width // heads)
            q_, k_, v_ = (part[place].view(shape).transpose(1, 2) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q_, k_, v_)
            mixed[place] = attended.transpose(1, 2).reshape(-1, heads, width // heads)
        return F.linear(mixed.view(tokens, width), *layer.out)


def load_network(weights: Weights, config: ESM2Config, device: torch.device) -> Network:
    """Read the tensors into float32 memory on `device`, a few mapped at a time.

    Nothing is initialised first, and no second copy is kept: the peak is the model plus the
    tensors of one mapping. Raises WeightsError for rotary frequencies that differ by layer.
    """
    shapes = trunk_shapes(config.num_layers, config.hidden_dim)
    held = {name: _place(name, config.hidden_dim) for name in shapes}
    tensors: dict[str, torch.Tensor] = {}
    for start in range(0, len(shapes), _TENSORS_PER_MAPPING):
        for name, stored in weights.read(list(shapes)[start : start + _TENSORS_PER_MAPPING]):
            target, rows = held[name]
            if target not in tensors:
                shape = shapes[name]
                whole = (3 * shape[0], *shape[1:]) if rows is not None else shape
                tensors[target] = torch.empty(whole, dtype=torch.float32, device=device)
            (tensors[target] if rows is None else tensors[target][rows]).copy_(stored)
        del stored
    layers = []
    for i in range(config.num_layers):
        parts = {
            field: (tensors[f"layers.{i}.{part}.weight"], tensors[f"layers.{i}.{part}.bias"])
            for field, part in _FIELDS.items()
        }
        layers.append(_Layer(**parts))
    final = tensors["emb_layer_norm_after.weight"], tensors["emb_layer_norm_after.bias"]
    inv_freq = _inverse_frequencies(weights, config).to(device)
    return Network(config, tensors["embed_tokens.weight"], layers, final, inv_freq)


_FIELDS = {
    "attention_norm": "self_attn_layer_norm",
    "qkv": "self_attn.qkv",
    "out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _place(name: str, hidden_dim: int) -> tuple[str, slice | None]:
    """Return the tensor in memory that `name` goes to, and which rows of it."""
    for number, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if f".{projection}." in name:
            rows = slice(number * hidden_dim, (number + 1) * hidden_dim)
            return name.replace(projection, "qkv"), rows
    return name, None


def _inverse_frequencies(weights: Weights, config: ESM2Config) -> torch.Tensor:
    """Return the (head_dim / 2,) rotary frequencies in float32.

    Where the file holds them fair-esm loads them from there, rounded as they were stored; its
    formula serves where it does not.
    """
    head_dim = config.hidden_dim // config.attention_heads
    names = [f"layers.{i}.self_attn.rot_emb.inv_freq" for i in range(config.num_layers)]
    stored = [
        tensor.float().clone()
        for _, tensor in weights.read(name for name in names if name in weights.tensors)
    ]
    if not stored:
        return 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if any(one.shape != (head_dim // 2,) or not torch.equal(one, stored[0]) for one in stored):
        raise WeightsError(f"{weights.path}: rot_emb.inv_freq is not the same in every layer")
    return stored[0]


def _norm(x: torch.Tensor, weight_bias: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), *weight_bias, eps=_NORM_EPS)


def _feed_forward(layer: _Layer, x: torch.Tensor) -> torch.Tensor:
    inner = F.gelu(F.linear(_norm(x, layer.ffn_norm), *layer.fc1))
    return F.linear(inner, *layer.fc2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions (Su et al. 2021); x: (T, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
