"""The formats of weights: where a model lies on disk, and which class reads it.

CONTRIBUTING.md says what a new format takes. A LoRA adapter is not a format of its own:
lib/models/adapted.py lays it over weights of any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from lib.catalog import RELEASED, hub_name
from lib.errors import WeightsError
from lib.models.bare_tensors import SafetensorsFile, StateDictFile
from lib.models.candidate import Candidate
from lib.models.fair_esm_file import FairEsmFile
from lib.models.hub import cached_model
from lib.models.huggingface import HuggingFaceFolder
from lib.models.weights import Weights
from schema.settings import ModelSettings

__all__ = ["FORMATS", "WeightsFormat", "find_weights", "hub_checkpoints", "open_weights"]


class WeightsFormat(Protocol):
    """A class of weights, as `open_weights` uses it."""

    @property
    def format(self) -> str:
        """The name of the format."""

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether what lies there should be opened as this format."""

    def open(self, candidate: Candidate) -> Weights:
        """Read metadata, but no tensor data; raises WeightsError if it is not an ESM-2 model."""


# The first one that recognises a path opens it. One is there for every path that exists, so that
# a path which is not an ESM-2 model is refused with the reason why it is not.
FORMATS: tuple[WeightsFormat, ...] = (
    HuggingFaceFolder,
    SafetensorsFile,
    StateDictFile,
    FairEsmFile,
)


def open_weights(path: Path) -> Weights:
    """Read the metadata of the weights at `path`, but no tensor data.

    Raises WeightsError, in one line, for anything that is not an ESM-2 model.
    """
    candidate = Candidate(path)
    return next(form.open(candidate) for form in FORMATS if form.recognises(candidate))


def hub_checkpoints() -> Path:
    """Return the folder where torch hub, and therefore fair-esm, keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(model: ModelSettings) -> Path | None:
    """Return where the chosen model lies, or None for a released name that is not on disk.

    Raises WeightsError for anything that is neither a released name nor a path that can be seen.
    """
    if model.esm_model not in RELEASED:
        path = Path(model.esm_model)
        try:
            there = path.exists()
        except OSError as error:
            raise WeightsError(f"esm_model {path}: {error.strerror or error}") from None
        if not there:
            raise WeightsError(f"esm_model {path}: no such file or folder, {_what_is_known(path)}")
        return path
    if model.source == "huggingface":
        return cached_model(model.esm_model)
    folders = [Path(model.weights_directory)] if model.weights_directory else []
    for folder in [*folders, hub_checkpoints()]:
        path = folder / f"{model.esm_model}.pt"
        if path.is_file():
            return path
    return None


def _what_is_known(path: Path) -> str:
    """Return what there is instead of a path that does not exist."""
    name = path.name
    if name in RELEASED:
        of_hub = f", or {hub_name(name)} on the Hugging Face Hub" if RELEASED[name].hub else ""
        return f"and the released model is {name}{of_hub}"
    not_of_hub = " and ".join(name for name, model in RELEASED.items() if model.hub is None)
    return (
        f"and {name!r} is not one of the released names {', '.join(RELEASED)}, which may have "
        f"facebook/ before them, but for {not_of_hub}"
    )
