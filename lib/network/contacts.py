"""Predicted contacts: a logistic regression over the attention maps of every layer.

This computes what ESMContactPredictionHead in fair-esm 2.0.0's esm/modules.py computes (Rao et al.
2021, doi:10.1101/2020.12.15.422761): it removes <cls> and <eos> from the maps, makes them
symmetric, applies the average product correction (Dunn et al. 2008), and sums them with weights.
fair-esm keeps the maps of all layers and heads for that; here each layer is added to the sum as
soon as it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.models.regression import Regression
from lib.network.groups import Group

__all__ = ["BLOCK_BYTES", "ContactMaps"]

# Attention maps are computed in blocks of this size; one map of a long sequence may be larger.
BLOCK_BYTES = 16 << 20


class ContactMaps:
    """The contacts of the sequences of a pack, summed layer by layer in one pass of a network.

    For the map A of a head, without <cls> and <eos>, with row sums r and column sums c, fair-esm
    adds w (S - s s' / sum(s)), where S = A + A' and s = r + c. This adds half of it,
    w (A - s s' / (2 sum(s))), and `finish` adds the sum to its transpose.
    """

    def __init__(
        self, regression: Regression, groups: Sequence[Group], device: torch.device
    ) -> None:
        self._weight = regression.weight.to(device)
        self._bias = regression.bias
        self._groups = groups
        self._layers_added = 0
        self._halves = [
            torch.zeros(group.count, group.tokens - 2, group.tokens - 2, device=device)
            for group in groups
        ]

    def add(self, qk: torch.Tensor) -> None:
        """Add the attention of the next layer.

        qk: (T, 2, heads, head_dim) float32, queries and keys of the pack with rotary positions,
        as `lib.network.attention.turned` returns them.
        """
        weight = self._weight[self._layers_added]
        heads = len(weight)
        for group, halves in zip(self._groups, self._halves, strict=True):
            part = qk[group.start : group.stop]
            part = part.view(group.count, group.tokens, *qk.shape[1:])
            q, k = part.permute(2, 0, 3, 1, 4).unbind(0)
            maps = max(1, BLOCK_BYTES // (4 * group.tokens**2))
            heads_at_once = min(heads, maps)
            sequences_at_once = max(1, maps // heads)
            for i in range(0, group.count, sequences_at_once):
                for j in range(0, heads, heads_at_once):
                    block = slice(i, i + sequences_at_once), slice(j, j + heads_at_once)
                    _add_block(halves[block[0]], q[block], k[block], weight[block[1]])
        self._layers_added += 1

    def finish(self) -> list[torch.Tensor]:
        """Return one (residues, residues) float32 tensor of probabilities per sequence."""
        found: list[torch.Tensor] = []
        for halves in self._halves:
            found += (halves + halves.transpose(1, 2)).add_(self._bias).sigmoid_()
        self._halves = []
        return found


def _add_block(
    halves: torch.Tensor, q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor
) -> None:
    """Add the maps of a few heads of a few sequences.

    halves: (sequences, residues, residues); q, k: (sequences, heads, tokens, head_dim);
    weight: (heads,).
    """
    attention = torch.softmax(q @ k.transpose(2, 3), -1)[:, :, 1:-1, 1:-1]
    sums = attention.sum(3) + attention.sum(2)
    corrected = sums * (weight[:, None] / sums.sum(2, keepdim=True))
    halves.baddbmm_(sums.transpose(1, 2), corrected, alpha=-0.5)
    halves += torch.einsum("shij,h->sij", attention, weight)
