"""Rotary positions (Su et al. 2021): by how much each position turns the pairs of a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.network.device import sent
from lib.network.groups import Group

__all__ = ["turns_by_position", "turns_by_token"]


def turns_by_token(groups: Sequence[Group], inv_freq: torch.Tensor) -> torch.Tensor:
    """Return the turns of a pack's tokens, (T, 2, 1, head_dim / 2) complex64.

    The first is the query's, which carries the scale of the scores, head_dim ** -0.5; the second
    the key's. inv_freq: (head_dim / 2,) float32, whose device the result is on.
    """
    turns = _turns(groups, inv_freq)
    scale = (2 * len(inv_freq)) ** -0.5
    rows = torch.cat([torch.arange(group.tokens).repeat(group.count) for group in groups])
    return torch.stack((turns * scale, turns), dim=1)[sent(rows, turns.device)].unsqueeze(2)


def turns_by_position(groups: Sequence[Group], inv_freq: torch.Tensor) -> torch.Tensor:
    """Return cosines and signed sines, (2, longest, head_dim) float32, of a pack's positions.

    Neighbours turn together: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    turns = _turns(groups, inv_freq)
    cos, sin = turns.real, turns.imag
    return torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(-2)


def _turns(groups: Sequence[Group], inv_freq: torch.Tensor) -> torch.Tensor:
    """Return (longest, head_dim / 2) complex64 turns by position.

    Not by torch.cos and torch.sin, which are those of MKL's vector library on a CPU: in two of 469
    processes whose first two packs began together, one of them got 12 bits in place of 24.
    """
    longest = max(group.tokens for group in groups)
    positions = torch.arange(longest, device=inv_freq.device, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq)
    return torch.polar(torch.ones_like(angles), angles)
