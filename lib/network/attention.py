"""Attention within each sequence of a pack, by the fastest kernel for device and precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from lib.network.elementwise import Elementwise
from lib.network.groups import Group

__all__ = ["attend", "sequence_bounds", "takes_varlen", "turned"]

# A block of scores is this small so that it stays in a core's cache between the two products.
_SCORE_BYTES = 2 << 20
# Rows of scores are padded to a multiple of this: softmax is up to twice as fast on whole vectors
# as on rows with a remainder, which saves more than the added columns cost.
_COLUMNS = 32
# Longer sequences go through a kernel that never stores all their scores.
_BLOCKED_TOKENS = 2048


def attend(
    qkv: torch.Tensor,
    rotary: torch.Tensor,
    groups: Sequence[Group],
    bounds: torch.Tensor,
    rows: int,
    elementwise: Elementwise | None = None,
) -> torch.Tensor:
    """Return the attended values, (rows, heads, head_dim), in the dtype of `qkv`.

    qkv: (T, 3, heads, head_dim), which this may overwrite; in queries and keys, the two numbers
    that turn together are neighbours. rotary: (T, 2, 1, head_dim / 2) complex64, the turn of each
    token's query, which includes the scale of the scores, and of its key. bounds:
    `sequence_bounds` of the groups, on the device. rows: T, or more on a CPU; those after T are
    zeros. elementwise: turns a copy of the whole pack, instead of what is the fastest uncompiled.
    """
    v = qkv[:, 2]
    is_varlen = takes_varlen(v.device, v.dtype, v.shape[-1])
    whole = None
    if elementwise is not None:
        whole = elementwise.turned(qkv[:, :2], torch.view_as_real(rotary))
    elif is_varlen:
        # float16 needs no copy: torch has complex numbers of float16, but not of bfloat16.
        whole = turned(qkv[:, :2] if v.dtype is torch.float16 else qkv[:, :2].float(), rotary)
    if is_varlen:
        assert whole is not None
        return _varlen(whole, v, groups, bounds)
    mixed = torch.empty((rows, *v.shape[1:]), dtype=v.dtype, device=v.device)
    mixed[len(v) :] = 0
    for group in groups:
        part = slice(group.start, group.stop)
        # Turned by group and not by pack, so that the products find it in the cache.
        qk = turned(qkv[part, :2].float(), rotary[part]) if whole is None else whole[part]
        is_half_on_cpu = v.device.type == "cpu" and v.dtype is not torch.float32
        blocked = is_half_on_cpu and group.tokens <= _BLOCKED_TOKENS
        attend_group = _blocked if blocked else _flash
        attend_group(qk, v[part], mixed[part], group)
    return mixed


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's variable-length kernel, which is FlashAttention's, can be used.

    It refuses GPUs before Ampere, float32, and widths that are not a multiple of 8 or above 256.
    """
    if device.type != "cuda" or dtype is torch.float32 or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def turned(qk: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to queries and keys, (T, 2, heads, head_dim), in place.

    qk: float32 or float16. One complex product (Su et al. 2021); torch computes it in complex64
    for float16 too, and rounds the result.
    """
    torch.view_as_complex(qk.view(*qk.shape[:-1], -1, 2)).mul_(rotary)
    return qk


def _flash(qk: torch.Tensor, v: torch.Tensor, mixed: torch.Tensor, group: Group) -> None:
    """Attend by torch's fused kernel, in one call for the sequences of a group."""
    q, k = (_by_sequence(one.to(v.dtype), group).transpose(1, 2) for one in qk.unbind(1))
    values = _by_sequence(v, group).transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, k, values, scale=1.0)
    _by_sequence(mixed, group).copy_(attended.transpose(1, 2))


def _blocked(qk: torch.Tensor, v: torch.Tensor, mixed: torch.Tensor, group: Group) -> None:
    """Attend by plain products, a few heads at a time; softmax computes in float32.

    In half precision on CPU, this is faster than the fused kernel up to `_BLOCKED_TOKENS`.
    """
    tokens, heads, width = group.tokens, v.shape[1], v.shape[2]
    count, batch = group.count, group.count * heads
    columns = -(-tokens // _COLUMNS) * _COLUMNS
    q = torch.empty(count, heads, tokens, width, dtype=v.dtype, device=v.device)
    q.copy_(_by_sequence(qk[:, 0], group).transpose(1, 2))
    kv = torch.empty(2, count, heads, columns, width, dtype=v.dtype, device=v.device)
    kv[0, :, :, :tokens].copy_(_by_sequence(qk[:, 1], group).transpose(1, 2))
    kv[1, :, :, :tokens].copy_(_by_sequence(v, group).transpose(1, 2))
    kv[:, :, :, tokens:] = 0
    q = q.view(batch, tokens, width)
    k, values = kv.view(2, batch, columns, width).unbind(0)
    attended = torch.empty_like(q)
    size = max(torch.get_num_threads(), _SCORE_BYTES // (tokens * columns * v.element_size()))
    for start in range(0, batch, size):
        block = slice(start, start + size)
        scores = torch.bmm(q[block], k[block].transpose(1, 2))
        scores[:, :, tokens:] = -torch.inf
        torch.bmm(torch.softmax(scores, -1), values[block], out=attended[block])
    _by_sequence(mixed, group).copy_(attended.view(count, heads, tokens, width).transpose(1, 2))


def _by_sequence(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Return a (count, tokens, …) view of the tokens of a group."""
    return part.view(group.count, group.tokens, *part.shape[1:])


def _varlen(
    qk: torch.Tensor, v: torch.Tensor, groups: Sequence[Group], bounds: torch.Tensor
) -> torch.Tensor:
    """Attend by torch's variable-length kernel on CUDA, in one call for the whole pack."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = qk.to(v.dtype).unbind(1)
    longest = max(group.tokens for group in groups)
    attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=1.0)
    assert isinstance(attended, torch.Tensor)
    return attended


def sequence_bounds(groups: Sequence[Group]) -> torch.Tensor:
    """Return (N + 1,) int32: the first token of each sequence of a pack, and its end."""
    lengths = [group.tokens for group in groups for _ in range(group.count)]
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(lengths).cumsum(0)
    return bounds
