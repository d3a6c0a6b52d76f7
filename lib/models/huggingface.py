"""Hugging Face's format: a folder with config.json and weights under transformers' names.

The weights are model.safetensors or pytorch_model.bin, as a single file or as shards with an
index. If a folder has both, safetensors are read, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lib.errors import WeightsError
from lib.files import file_sha256, listing_sha256
from lib.models.tensor_file import read_stored, stored_tensors
from lib.models.tensor_names import fair_esm_name
from lib.models.weights import (
    Stamp,
    TensorInfo,
    Weights,
    read_json,
    refuse_if_restamped,
    stamp_of,
)

__all__ = ["HuggingFaceFolder"]

_CONFIG = "config.json"
# What transformers calls the properties, in config.json.
_CONFIG_WORDS = {
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class HuggingFaceFolder:
    """Weights in Hugging Face's format, of which only metadata has been read.

    files: those that hold the tensors, in the order in which they are read.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    untrained: bool
    stamp: Stamp
    format: ClassVar[str] = "huggingface"
    # The contact regression is among the tensors.
    regression_file: ClassVar[None] = None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether `path` is a folder."""
        return path.is_dir()

    @classmethod
    def open(cls, path: Path) -> HuggingFaceFolder:
        """Read the metadata; raises WeightsError if the folder does not hold an ESM-2 model."""
        stamp = stamp_of(sorted(path.iterdir()))
        config = read_json(path / _CONFIG)
        _refuse_other_models(config, path)
        files = _weight_files(path)
        metadata = {key: config[word] for key, word in _CONFIG_WORDS.items() if word in config}
        untrained = config.get("untrained") is True
        return cls(path, files, metadata, _tensors(files), untrained, stamp)

    @property
    def unadapted(self) -> Weights:
        """These weights."""
        return self

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if a file of the folder was written, replaced, added or removed."""
        refuse_if_restamped(self.path, self.stamp, stamp_of(sorted(self.path.iterdir())))

    def sha256(self) -> str:
        """Return the SHA-256 of what `sha256sum` prints for config.json and the files of weights.

        Raises OSError.
        """
        return self.sha256_with({})

    def sha256_with(self, digests: Mapping[str, str]) -> str:
        """Return what `sha256` is if the files that `digests` names have these SHA-256."""
        paths = (self.path / _CONFIG, *self.files)
        return listing_sha256(
            (digests.get(path.name) or file_sha256(path), path.name) for path in paths
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored, in the order of the files."""
        wanted = set(names)
        for file in self.files:
            for stored, tensor in read_stored(file, lambda stored: fair_esm_name(stored) in wanted):
                yield fair_esm_name(stored), tensor


def _refuse_other_models(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a config.json that describes another architecture than that of ESM-2."""
    if config.get("model_type") != "esm":
        raise WeightsError(f"{folder}: model_type {config.get('model_type')!r}, not 'esm'")
    if config.get("is_folding_model"):
        raise WeightsError(f"{folder}: an ESMFold model (is_folding_model), not ESM-2")
    if config.get("position_embedding_type") != "rotary":
        raise WeightsError(
            f"{folder}: position_embedding_type {config.get('position_embedding_type')!r}: "
            "ESM-2 has 'rotary'"
        )
    if config.get("emb_layer_norm_before"):
        raise WeightsError(f"{folder}: emb_layer_norm_before is set: ESM-1b or ESM-1v, not ESM-2")
    eps = config.get("layer_norm_eps", _LAYER_NORM_EPS)
    if eps != _LAYER_NORM_EPS:
        raise WeightsError(f"{folder}: layer_norm_eps {eps!r}: ESM-2 has {_LAYER_NORM_EPS!r}")


def _tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for stored, info in stored_tensors(file).items():
            name = fair_esm_name(stored)
            if name in tensors:
                raise WeightsError(f"{file}: two tensors are {name}, the second is {stored}")
            tensors[name] = info
    return tensors


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of weights to read: the shards that an index names, or the single one."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            return _shards(folder, index, Path(single).suffix)
        if (folder / single).is_file():
            return (folder / single,)
    raise WeightsError(
        f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards"
    )


def _shards(folder: Path, index: Path, suffix: str) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{index}: names {name!r}, which is not a file of the folder")
        if Path(name).suffix != suffix:
            raise WeightsError(f"{index}: names {name!r}, which is not a {suffix} file")
    return tuple(folder / name for name in names)
