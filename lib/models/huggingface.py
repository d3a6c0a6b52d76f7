"""Hugging Face's format: a folder with config.json and weights under transformers' names.

The weights are model.safetensors or pytorch_model.bin, as a single file or as shards with an
index. Where a folder has several of these, the one that transformers reads is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lib.errors import WeightsError
from lib.files import listing_sha256
from lib.models.candidate import Candidate
from lib.models.held_file import HeldFile
from lib.models.huggingface_config import (
    metadata,
    refuse_other_models,
    refuse_other_rotary,
    unknown_keys,
)
from lib.models.stored import ROTARY, StoredTensor, with_rotary_of_every_layer
from lib.models.tensor_file import read_stored, stored_tensors
from lib.models.tensor_names import fair_esm_name, hugging_face_name, is_of_trunk
from lib.models.vocabulary import refuse_other_numbers
from lib.models.weights import TensorInfo, Weights, read_json

__all__ = ["WEIGHT_FILES", "HuggingFaceFolder"]

_CONFIG = "config.json"
_INDEX = ".index.json"
# Weights as a file, or the index of their shards; transformers reads the first one that is there.
WEIGHT_FILES = (
    *("model.safetensors", f"model.safetensors{_INDEX}"),
    *("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
)


@dataclass(frozen=True)
class HuggingFaceFolder:
    """Weights in Hugging Face's format, of which only metadata has been read.

    files: those that hold the tensors, in the order in which they are read. stored: the tensors
    by fair-esm's names; rotary frequencies that are stored once stand for every layer.
    """

    path: Path
    config: HeldFile
    files: tuple[HeldFile, ...]
    metadata: Mapping[str, object]
    stored: Mapping[str, StoredTensor]
    untrained: bool
    unknown_keys: tuple[str, ...]
    format: ClassVar[str] = "huggingface"
    # The contact regression is among the tensors.
    regression_file: ClassVar[None] = None
    # transformers puts nothing but heads beside a trunk.
    left_out: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def recognises(cls, candidate: Candidate) -> bool:
        """Return whether it is a folder."""
        return candidate.path.is_dir()

    @classmethod
    def open(cls, candidate: Candidate) -> HuggingFaceFolder:
        """Read the metadata; raises WeightsError if the folder does not hold an ESM-2 model."""
        path = candidate.path
        config_file = HeldFile(path / _CONFIG)
        config = read_json(config_file)
        refuse_other_models(config, path)
        refuse_other_numbers(path)
        files = tuple(map(HeldFile, _weight_files(path)))
        stored = with_rotary_of_every_layer(_without_heads(_stored_in(files)), path)
        if not any(name.endswith(ROTARY) for name in stored):
            refuse_other_rotary(config, path)
        untrained, unknown = config.get("untrained") is True, unknown_keys(config)
        return cls(path, config_file, files, metadata(config), stored, untrained, unknown)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, but for heads that lie beside the trunk."""
        return {name: stored.info for name, stored in self.stored.items()}

    @property
    def unadapted(self) -> Weights:
        """These weights."""
        return self

    def stored_name(self, name: str) -> str:
        """Return what the file calls a tensor, or would call it by the look of the others."""
        if name in self.stored:
            return self.stored[name].name
        others = [stored.name for stored in self.stored.values()]
        told = hugging_face_name(name)
        if not any(other.startswith("esm.") for other in others):
            told = told.removeprefix("esm.")
        if any(other.endswith("LayerNorm.gamma") for other in others):
            told = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", told)
            told = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", told)
        return told

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if config.json or a file of weights was written to or replaced."""
        for file in (self.config, *self.files):
            file.refuse_if_changed()

    def sha256(self) -> str:
        """Return the SHA-256 of what `sha256sum` prints for config.json and the files of weights.

        Raises OSError.
        """
        return self.sha256_with({})

    def sha256_with(self, digests: Mapping[str, str]) -> str:
        """Return what `sha256` is if the files that `digests` names have these SHA-256."""
        files = (self.config, *self.files)
        return listing_sha256(
            (digests.get(file.path.name) or file.sha256(), file.path.name) for file in files
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored, in the order of the files."""
        wanted: dict[tuple[HeldFile, str], list[str]] = {}
        for name in names:
            stored = self.stored[name]
            wanted.setdefault((stored.file, stored.name), []).append(name)
        for file in self.files:
            here = {key: known for (held, key), known in wanted.items() if held is file}
            for key, tensor in read_stored(file, here.__contains__):
                for name in here[key]:
                    yield name, tensor


def _stored_in(files: Iterable[HeldFile]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for key, info in stored_tensors(file).items():
            name = fair_esm_name(key)
            if name in tensors:
                raise WeightsError(f"{file.path}: two tensors are {name}, the second is {key}")
            tensors[name] = StoredTensor(file, key, info)
    return tensors


def _without_heads(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave out heads: what has no `esm.` before its name where the trunk has."""
    embedding = stored.get("embed_tokens.weight")
    if embedding is None or not embedding.name.startswith("esm."):
        return dict(stored)
    return {
        name: tensor
        for name, tensor in stored.items()
        if tensor.name.startswith("esm.") or is_of_trunk(name)
    }


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of weights to read, of which transformers takes the first that is there."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            whole = name.removesuffix(_INDEX)
            return (path,) if name == whole else _shards(folder, path, Path(whole).suffix)
    raise WeightsError(
        f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards"
    )


def _shards(folder: Path, index: Path, suffix: str) -> tuple[Path, ...]:
    weight_map = read_json(HeldFile(index)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: names {name!r}, which is not a file of the folder")
        if Path(name).suffix != suffix:
            raise WeightsError(f"{index}: names {name!r}, which is not a {suffix} file")
    return tuple(folder / name for name in names)
