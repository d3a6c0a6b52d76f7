"""Predicted contacts: a logistic regression over the attention maps of every layer.

As ESMContactPredictionHead of fair-esm 2.0.0's esm/modules.py (Rao et al. 2021,
doi:10.1101/2020.12.15.422761): maps without <cls> and <eos>, made symmetric, corrected by the
average product (Dunn et al. 2008), weighed and summed. fair-esm holds the maps of all layers and
heads until then; here each is added to the sum as its layer goes by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lib.models.regression import Regression
from lib.sequences.plan import Group

__all__ = ["BLOCK_BYTES", "ContactMaps"]

# Attention maps are made so many at a time; one map of a long sequence may be larger.
BLOCK_BYTES = 16 << 20


class ContactMaps:
    """The contacts of the sequences of a pack, summed up layer by layer; for one pass of a network.

    With A a head's map without <cls> and <eos>, r its row sums and c its column sums, fair-esm's
    head adds w (S - s s' / sum(s)) with S = A + A' and s = r + c. Here half of that is summed,
    w (A - s s' / (2 sum(s))), and in the end added to its transpose.
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
        as `lib.network.attention.turned` gives them.
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
        """Return one (residues, residues) float32 of probabilities per sequence."""
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
