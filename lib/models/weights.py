"""Weights: what an ESM-2 model on disk offers, whatever its format.

lib/models/formats.py lists the formats, and says how to add one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lib.errors import WeightsError
from lib.models.held_file import HeldFile

__all__ = ["TensorInfo", "Weights", "read_json"]


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """An ESM-2 model on disk, of which only metadata has been read.

    Every format translates its own names: properties have the names of ModelShape's fields, and
    tensors have fair-esm's names without prefix (`layers.0.fc1.weight`).
    """

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def format(self) -> str:
        """One of `schema.esm2_config.WEIGHTS_FORMATS`; part of a model's identity."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """The properties that the weights' own configuration states, unchecked."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor."""

    @property
    def untrained(self) -> bool:
        """Whether the weights say that scripts/make_model.py made them."""

    @property
    def regression_file(self) -> Path | None:
        """Where the format keeps a contact regression apart; None: only among the tensors."""

    @property
    def unadapted(self) -> Weights:
        """These weights, or the base of adapted ones."""

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of the configuration of which it is not known whether they change a vector."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Modules beside the trunk that are not heads of a known name, and that are not read."""

    def stored_name(self, name: str) -> str:
        """Return what the file calls a tensor, or would call it if it is not there."""

    def refuse_if_changed(self) -> None:
        """Raise WeightsError unless the files are still those whose metadata was read.

        To be called after the tensors are in memory, and before anything is made of them.
        """

    def sha256(self) -> str:
        """Return the digest of everything on disk that can change a vector; raises OSError."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for each of `names`, in any order and in the stored type.

        The tensors may be views of a mapped file, whose pages stay in memory as long as one of
        them lives: ask for a few at a time and let go of them, so that the file never becomes a
        second copy of the model.
        """


def read_json(file: HeldFile) -> dict[str, Any]:
    """Return the object in a JSON file; raises WeightsError if the file holds anything else."""
    try:
        content = json.loads(file.open_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{file.path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WeightsError(f"{file.path}: not JSON") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file.path}: not a JSON object")
    return content
