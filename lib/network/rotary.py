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
    angles = _angles(groups, inv_freq)
    turns = torch.polar(torch.ones_like(angles), angles)
    scale = (2 * len(inv_freq)) ** -0.5
    rows = torch.cat([torch.arange(group.tokens).repeat(group.count) for group in groups])
    return torch.stack((turns * scale, turns), dim=1)[sent(rows, turns.device)].unsqueeze(2)


def turns_by_position(groups: Sequence[Group], inv_freq: torch.Tensor) -> torch.Tensor:
    """Return cosines and signed sines, (2, longest, head_dim) float32, of a pack's positions.

    Neighbours turn together: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    angles = _angles(groups, inv_freq)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(-2)


def _angles(groups: Sequence[Group], inv_freq: torch.Tensor) -> torch.Tensor:
    """Return (longest, head_dim / 2) angles by position."""
    longest = max(group.tokens for group in groups)
    return torch.outer(torch.arange(longest, device=inv_freq.device, dtype=torch.float32), inv_freq)
