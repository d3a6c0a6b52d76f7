"""The ESM-2 network for inference, over packs without padding.

The architecture is that of fair-esm 2.0.0's esm/model/esm2.py (Lin et al. 2022): token embedding
scaled as in training with token dropout, pre-norm layers with rotary positions and exact GELU,
and a final layer norm on the last layer only.

In half precision only matrix products are: the residual stream, layer norms, rotary positions
and softmax work in float32. What stands between the products is in lib/network/elementwise.py;
uncompiled, some of it is done by the products (lib/network/linear.py) and by attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from lib.errors import WeightsError
from lib.models.detection import Detection
from lib.models.regression import Regression
from lib.network.attention import attend, sequence_bounds, turned
from lib.network.contacts import ContactMaps
from lib.network.device import sent
from lib.network.elementwise import PLAIN, Elementwise
from lib.network.fused import FusedAttention, fused_attention
from lib.network.groups import Group, group_equal_lengths
from lib.network.linear import Affine, linear, linear_add, linear_gelu, rows_of
from lib.network.rotary import turns_by_position, turns_by_token
from schema.esm2_config import ModelShape

__all__ = ["Network", "load_network"]

# With token dropout 15 % of the tokens were chosen in training and 80 % of those masked.
_UNMASKED = 1 - 0.15 * 0.8
# A mapping has at least so many tensors, as each follows the file's pickle anew, and so many bytes.
_TENSORS_PER_MAPPING = 32
_BYTES_PER_MAPPING = 1 << 24


@dataclass
class _Layer:
    """Tensors of one transformer layer; q, k and v stand in one (3 * hidden_dim, hidden_dim)."""

    attention_norm: Affine
    qkv: Affine
    out: Affine
    ffn_norm: Affine
    fc1: Affine
    fc2: Affine


_FIELDS = {
    "attention_norm": "self_attn_layer_norm",
    "qkv": "self_attn.qkv",
    "out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


@dataclass(frozen=True)
class _Positions:
    """Where the tokens of a pack stand: what attention takes beside queries, keys and values."""

    groups: Sequence[Group]
    bounds: torch.Tensor
    inv_freq: torch.Tensor

    @cached_property
    def rotary(self) -> torch.Tensor:
        """The turns by token, for `attend` and for contact maps."""
        return turns_by_token(self.groups, self.inv_freq)

    @cached_property
    def turns(self) -> torch.Tensor:
        """The turns by position, for the fused kernel."""
        return turns_by_position(self.groups, self.inv_freq)


class Network:
    """An ESM-2 trunk whose weights are in memory; made by `load_network`.

    `dtype` is the type of matrix products, `regression` what contacts are predicted with,
    `elementwise` what computes between the products, None if it is not compiled, `fused` what
    computes attention, None if torch's operations do.
    """

    elementwise: Elementwise | None = None
    fused: FusedAttention | None = None

    def __init__(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        embedding: torch.Tensor,
        layers: list[_Layer],
        final_norm: Affine,
        inv_freq: torch.Tensor,
        regression: Regression | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = embedding.device
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._inv_freq = inv_freq
        self.regression = regression

    def forward(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        repr_layers: Iterable[int],
        maps: ContactMaps | None = None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (layer, (tokens, hidden_dim) float32) for each of `repr_layers`, ascending.

        tokens: (T,) of sequences end to end, each with <cls> and <eos>; lengths: (N,) residues
        per sequence. What is yielded may be overwritten when the next layer is asked for, and
        layers after the last one wanted are not computed, but all of them if `maps`, which the
        attention of every layer is added to, is given.
        """
        wanted = set(repr_layers)
        groups = group_equal_lengths(lengths)
        x = F.embedding(sent(tokens, self.device).long(), self._embedding)
        if self.shape.token_dropout:
            x *= _UNMASKED
        if 0 in wanted:
            yield 0, x
        count = len(x)
        x = F.pad(x, (0, 0, 0, rows_of(count, self.device, self.dtype) - count))
        bounds = sent(sequence_bounds(groups), self.device)
        where = _Positions(groups, bounds, self._inv_freq)
        last = max(wanted) if maps is None else self.shape.num_layers
        ready = None  # the next layer norm, where it came with the addition before it
        for number, layer in enumerate(self._layers[:last], start=1):
            attended = self._attention(layer, x, ready, where, maps)
            x, ready = self._added(x, attended, layer.out, layer.ffn_norm)
            del attended
            inner = self._gelu(self._normed(x, ready, layer.ffn_norm), layer.fc1)
            if number < self.shape.num_layers:
                after = self._layers[number].attention_norm if number < last else None
                x, ready = self._added(x, inner, layer.fc2, after)
            else:
                x, ready = self._added(x, inner, layer.fc2, self._final_norm, torch.float32)
                x = self._normed(x, ready, self._final_norm, torch.float32)
            del inner  # or it would be in memory beside that of the next layer
            if number in wanted:
                yield number, x[:count]

    def _attention(
        self,
        layer: _Layer,
        x: torch.Tensor,
        ready: torch.Tensor | None,
        where: _Positions,
        maps: ContactMaps | None,
    ) -> torch.Tensor:
        rows, width = x.shape
        heads, tokens = self.shape.attention_heads, where.groups[-1].stop
        qkv = linear(self._normed(x, ready, layer.attention_norm), layer.qkv)[:tokens]
        qkv = qkv.view(tokens, 3, heads, width // heads)
        if maps is not None:
            maps.add(turned(qkv[:, :2].to(torch.float32, copy=True), where.rotary))
        if self.fused is not None:
            return self.fused(qkv, where.turns, where.bounds, rows).view(rows, width)
        attended = attend(qkv, where.rotary, where.groups, where.bounds, rows, self.elementwise)
        return attended.view(rows, width)

    def _normed(
        self,
        x: torch.Tensor,
        ready: torch.Tensor | None,
        norm: Affine,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return the layer norm of x, in `dtype` or the network's, unless it is `ready`."""
        if ready is not None:
            return ready
        steps = self.elementwise or PLAIN
        return steps.normed(x, *norm, dtype or self.dtype)

    def _gelu(self, x: torch.Tensor, weight_bias: Affine) -> torch.Tensor:
        if self.elementwise is None:
            return linear_gelu(x, weight_bias)
        return self.elementwise.gelu(linear(x, weight_bias))

    def _added(
        self,
        x: torch.Tensor,
        inner: torch.Tensor,
        weight_bias: Affine,
        norm: Affine | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x with the product of `inner` added, perhaps in place, and its layer norm if
        there is one and it comes with it.
        """
        if self.elementwise is None or norm is None:
            return linear_add(inner, weight_bias, x), None
        weight, bias = weight_bias
        product = linear(inner, (weight, None))
        return self.elementwise.added(x, product, bias, *norm, dtype or self.dtype)


def load_network(detection: Detection, device: torch.device, dtype: torch.dtype) -> Network:
    """Read the tensors of detected weights into memory on `device`, a few mapped at a time.

    Matrices and the biases of what stays in `dtype` become it, everything else float32. Nothing is
    initialised first, and no second copy is kept: the peak is the model plus the tensors of one
    mapping. Attention is fused if it can be. Raises WeightsError for rotary frequencies that differ
    by layer.
    """
    weights = detection.require_weights()
    shape = detection.shape
    shapes = shape.trunk_shapes()
    turns = [name for name in _rotary_names(shape) if name in weights.tensors]
    tensors: dict[str, torch.Tensor] = {}
    frequencies: list[torch.Tensor] = []
    for names in _mappings({**{name: weights.tensors[name].shape for name in turns}, **shapes}):
        for name, stored in weights.read(names):
            if name in turns:
                frequencies.append(stored.float().clone())
                continue
            target, rows = _place(name, shape.hidden_dim)
            if target not in tensors:
                own = shapes[name]
                whole = (3 * own[0], *own[1:]) if rows is not None else own
                kind = torch.float32 if _is_float32(name) else dtype
                tensors[target] = torch.empty(whole, dtype=kind, device=device)
            turned = ".q_proj." in name or ".k_proj." in name
            source = _pair_neighbours(stored, shape.attention_heads) if turned else stored
            (tensors[target] if rows is None else tensors[target][rows]).copy_(source)
        del stored, source
    layers = []
    for i in range(shape.num_layers):
        parts = {
            field: (tensors[f"layers.{i}.{part}.weight"], tensors[f"layers.{i}.{part}.bias"])
            for field, part in _FIELDS.items()
        }
        layers.append(_Layer(**parts))
    final = tensors["emb_layer_norm_after.weight"], tensors["emb_layer_norm_after.bias"]
    inv_freq = _inverse_frequencies(frequencies, shape.head_dim, weights.path).to(device)
    embedding = tensors["embed_tokens.weight"]
    network = Network(shape, dtype, embedding, layers, final, inv_freq, detection.regression)
    network.fused = fused_attention(device, dtype)
    return network


def _is_float32(name: str) -> bool:
    """Return whether a tensor is float32 in half precision, too.

    A bias that is added to the residual stream is: rounded with the product, large ones of opposite
    sign in two layers would leave more of the rounding than of themselves.
    """
    return "norm" in name or "embed" in name or name.endswith(("out_proj.bias", "fc2.bias"))


def _mappings(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield the names of tensors in parts that are mapped at once: few where they are large."""
    part, held = list[str](), 0
    for name, shape in shapes.items():
        part.append(name)
        held += 4 * math.prod(shape)
        if len(part) >= _TENSORS_PER_MAPPING and held >= _BYTES_PER_MAPPING:
            yield part
            part, held = [], 0
    if part:
        yield part


def _place(name: str, hidden_dim: int) -> tuple[str, slice | None]:
    """Return the tensor in memory that `name` goes to, and which rows of it."""
    for number, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if f".{projection}." in name:
            rows = slice(number * hidden_dim, (number + 1) * hidden_dim)
            return name.replace(projection, "qkv"), rows
    return name, None


def _pair_neighbours(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of every head from (0 … w/2, w/2 … w) to (0, w/2, 1, w/2 + 1, …).

    Done to q and k alike it leaves their products what they were, and the two numbers that a
    rotary position turns together are neighbours, a complex number.
    """
    halves = stored.view(heads, 2, -1, *stored.shape[1:])
    return halves.transpose(1, 2).reshape(stored.shape)


def _rotary_names(shape: ModelShape) -> list[str]:
    """Return the names of the rotary frequencies by layer, which a file may lack."""
    return [f"layers.{i}.self_attn.rot_emb.inv_freq" for i in range(shape.num_layers)]


def _inverse_frequencies(stored: Sequence[torch.Tensor], head_dim: int, path: Path) -> torch.Tensor:
    """Return the (head_dim / 2,) rotary frequencies in float32.

    Where the file holds them fair-esm loads them from there, rounded as they were stored; its
    formula serves where it does not.
    """
    if not stored:
        return 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if any(one.shape != (head_dim // 2,) or not torch.equal(one, stored[0]) for one in stored):
        raise WeightsError(f"{path}: rot_emb.inv_freq is not the same in every layer")
    return stored[0]
