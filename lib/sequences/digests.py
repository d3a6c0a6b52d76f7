"""Digests of texts, to find equal ones among a hundred million in 16 bytes each.

They are the first half of the SHA-256, so that they also find a text by its whole SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["Digests", "Index", "first_halves", "index_type"]

Index = npt.NDArray[np.int32 | np.int64]

_BYTES = 16
# Digests that `first_equal` compares at once: its temporary arrays stay small.
_CHUNK = 1 << 17


class Digests:
    """The digests of texts, numbered from 0 in the order they were added."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def extend(self, texts: Iterable[bytes]) -> None:
        """Append the digests of texts."""
        made = [hashlib.sha256(text).digest()[:_BYTES] for text in texts]
        self._digests += b"".join(made)

    def of(self, numbers: Index) -> npt.NDArray[np.uint64]:
        """Return (len(numbers), 2) the digests of some texts."""
        return np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)[numbers]

    def first_equal(self) -> Index:
        """Return (N,), for each text, the number of the first text that equals it."""
        halves = np.frombuffer(self._digests, dtype=np.uint64).reshape(-1, 2)
        order = _sorted(halves)
        first = np.empty(len(order), index_type(len(order)))
        for start in range(0, len(order), _CHUNK):
            part = order[start : start + _CHUNK]
            ordered = halves[order[max(0, start - 1) : start + _CHUNK]]
            begins = (ordered[1:] != ordered[:-1]).any(axis=1)
            if not start:
                begins = np.concatenate([[True], begins])
            # The place of the latest group that begins in this chunk; -1 for the group that
            # continues from the chunk before.
            places = np.maximum.accumulate(np.where(begins, np.arange(len(part)), -1))
            before = first[order[start - 1]] if start else 0
            first[part] = np.where(places < 0, before, part[places])
        return first


def _sorted(halves: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return (N,) an order in which equal digests follow each other, the first of them first."""
    # Both sorts are stable. Sorting halves takes half of the time and memory, and suffices unless
    # two texts share a half: one in 3,700 times among a hundred million.
    order = np.argsort(halves[:, 0], kind="stable")
    for start in range(0, len(order), _CHUNK):
        ordered = halves[order[start : start + _CHUNK + 1]]
        if ((ordered[1:, 0] == ordered[:-1, 0]) & (ordered[1:, 1] != ordered[:-1, 1])).any():
            return np.lexsort((halves[:, 1], halves[:, 0]))
    return order


def index_type(total: int) -> type[np.int32 | np.int64]:
    """Return the smallest type that has room for the numbers of `total` things, and for -1."""
    return np.int32 if total <= np.iinfo(np.int32).max else np.int64


def first_halves(digests: bytes | memoryview) -> npt.NDArray[np.uint64]:
    """Return (N, 2), of N whole SHA-256 end to end, what `Digests` keeps of each."""
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 4)[:, :2]
