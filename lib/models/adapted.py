"""Adapted weights: a base with a LoRA adapter merged into each tensor as it is read.

Hu et al. 2021 (doi:10.48550/arXiv.2106.09685): a matrix W (out, in) becomes W + s B A, computed in
float32, with A (r, in), B (out, r) and the adapter's scale s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.errors import WeightsError
from lib.files import listing_sha256
from lib.models.adapter import Adapter
from lib.models.tensor_file import read_stored
from lib.models.weights import TensorInfo, Weights

__all__ = ["AdaptedWeights", "lay_over"]


@dataclass(frozen=True)
class AdaptedWeights:
    """Weights of a base as an adapter changes them; made by `lay_over`."""

    base: Weights
    adapter: Adapter

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.adapter.folder

    @property
    def format(self) -> str:
        """The base's format and `+lora`."""
        return f"{self.base.format}+lora"

    @property
    def metadata(self) -> Mapping[str, object]:
        """The properties that the base states."""
        return self.base.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors: an adapter changes numbers, not shapes."""
        return self.base.tensors

    @property
    def untrained(self) -> bool:
        """Whether the base is untrained."""
        return self.base.untrained

    @property
    def regression_file(self) -> Path | None:
        """Where the base keeps its contact regression apart."""
        return self.base.regression_file

    @property
    def unadapted(self) -> Weights:
        """The base."""
        return self.base

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Those of the base: an adapter with a key that is not known is refused."""
        return self.base.unknown_keys

    @property
    def left_out(self) -> tuple[str, ...]:
        """Those of the base."""
        return self.base.left_out

    def stored_name(self, name: str) -> str:
        """Return what the base calls a tensor, or would call it."""
        return self.base.stored_name(name)

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if files of base or adapter are not those whose metadata was read."""
        self.base.refuse_if_changed()
        self.adapter.refuse_if_changed()

    def sha256(self) -> str:
        """Return the SHA-256 of a `sha256sum` listing: the adapter's files, and the base as `base`.

        Raises OSError.
        """
        return listing_sha256([*self.adapter.digests(), (self.base.sha256(), "base")])

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor): float32 where the adapter changes it, as stored elsewhere."""
        names = list(names)
        factors = [self.adapter.factors[name] for name in names if name in self.adapter.factors]
        stored = {part for a, b, _ in factors for part in (a, b)}
        stored |= {self.adapter.replacements.get(name, "") for name in names}
        parts = dict(read_stored(self.adapter.file, lambda name: name in stored))
        for name, tensor in self.base.read(names):
            yield name, self._merged(name, tensor, parts)

    def _merged(
        self, name: str, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if name in self.adapter.replacements:
            return parts[self.adapter.replacements[name]].float()
        if name in self.adapter.factors:
            a, b, scale = self.adapter.factors[name]
            return tensor.float() + (parts[b].float() @ parts[a].float()) * scale
        return tensor


def lay_over(base: Weights, adapter: Adapter) -> AdaptedWeights:
    """Return the base's weights as the adapter changes them.

    Raises WeightsError if a tensor of the adapter does not fit any of the base's.
    """
    for name, (a, b, _) in adapter.factors.items():
        shape = adapter.tensors[b].shape[0], adapter.tensors[a].shape[1]
        _check_fit(base, adapter, name, a, shape)
    for name, stored in adapter.replacements.items():
        _check_fit(base, adapter, name, stored, adapter.tensors[stored].shape)
    return AdaptedWeights(base, adapter)


def _check_fit(
    base: Weights, adapter: Adapter, name: str, stored: str, shape: tuple[int, ...]
) -> None:
    changed = base.tensors.get(name)
    if changed is None:
        raise WeightsError(
            f"{adapter.file.path}: tensor {stored} does not fit any module of {base.path}"
        )
    if changed.shape != shape:
        raise WeightsError(
            f"{adapter.file.path}: tensor {stored} belongs to a matrix or vector of shape {shape}, "
            f"{name} of {base.path} has {changed.shape}"
        )
