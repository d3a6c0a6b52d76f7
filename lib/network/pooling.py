"""Pooling: the per-token vectors of a pack reduced to what a run keeps of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.network.groups import Group

__all__ = ["bos", "mean", "per_tok"]


def mean(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Return (sequences, hidden_dim): the mean over residues, without <cls> and <eos>.

    hidden: (tokens, hidden_dim) of one layer, float32. The same as esm-extract's `mean`.
    """
    return torch.cat([_split(hidden, group)[:, 1:-1].mean(1) for group in groups])


def bos(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Return (sequences, hidden_dim): the vector of <cls>, esm-extract's `bos`."""
    return torch.cat([_split(hidden, group)[:, 0] for group in groups])


def per_tok(hidden: torch.Tensor, groups: Sequence[Group]) -> list[torch.Tensor]:
    """Return one (residues, hidden_dim) per sequence, esm-extract's `per_tok`."""
    return [residues for group in groups for residues in _split(hidden, group)[:, 1:-1]]


def _split(hidden: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the (count, tokens, hidden_dim) view of a group's tokens."""
    return hidden[group.start : group.stop].view(group.count, group.tokens, hidden.shape[1])
