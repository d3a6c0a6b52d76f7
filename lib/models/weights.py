"""Weights: where they lie, what their metadata says, and their tensors, read only when asked for.

A fair-esm `.pt` is a zip archive of torch.save with the keys `cfg` (an argparse.Namespace) and
`model` (a state dict). It is mapped, never read whole, and unpickled with weights_only=True and
argparse.Namespace as the only name allowed beside tensors.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.catalog import RELEASED
from lib.errors import WeightsError
from lib.files import file_sha256, files_stamp
from lib.models import huggingface
from lib.models.torch_archive import TensorInfo, load_archive, refuse_inflated, tensor_info
from schema.settings import ModelSettings

__all__ = ["Weights", "find_weights", "hub_checkpoints", "open_weights"]

_PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")
# fair-esm's own words for the properties, in cfg["model"].
_CFG_WORDS = {
    "num_layers": "encoder_layers",
    "hidden_dim": "encoder_embed_dim",
    "attention_heads": "encoder_attention_heads",
    "token_dropout": "token_dropout",
}


@dataclass(frozen=True)
class Weights:
    """An ESM-2 model on disk, of which only metadata has been read.

    `metadata` holds the properties that the file's own configuration states, `tensors` what
    is stored, by fair-esm's names without prefix.
    """

    path: Path
    format: str
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    untrained: bool
    stamp: tuple[object, ...]

    @property
    def unadapted(self) -> Weights:
        """These weights, or those that an adapter changes."""
        return self

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the files on disk are not those whose metadata was read."""
        if _stamp(self.path) != self.stamp:
            raise WeightsError(f"{self.path}: changed while it was being read")

    def sha256(self) -> str:
        """Return the SHA-256 of the file, or of a folder's `sha256sum` listing of its files."""
        if self.format == "huggingface":
            return huggingface.folder_sha256(self.path)
        return file_sha256(self.path)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored; the tensors are views of a mapping of the file.

        The mapping goes when the last of its tensors does: ask for a few at a time and let go
        of them, and the file's pages never add up to a second copy in memory.
        """
        if self.format == "huggingface":
            yield from huggingface.read_tensors(self.path, names)
            return
        state = _state_dict(load_archive(self.path), self.path)
        for name in names:
            yield name, state[name]


def hub_checkpoints() -> Path:
    """Return the folder where torch hub, and so fair-esm, keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(model: ModelSettings) -> Path | None:
    """Return where the chosen model lies, or None for a released name that is not on disk.

    Raises WeightsError for a path that does not exist, and for a name that is neither.
    """
    if model.esm_model not in RELEASED:
        path = Path(model.esm_model)
        if not path.exists():
            raise WeightsError(
                f"esm_model {path}: no such file or folder, and {path.name!r} is not one of the "
                f"released names {', '.join(RELEASED)}"
            )
        return path
    folders = [Path(model.weights_directory)] if model.weights_directory else []
    for folder in [*folders, hub_checkpoints()]:
        path = folder / f"{model.esm_model}.pt"
        if path.is_file():
            return path
    return None


def open_weights(path: Path) -> Weights:
    """Read the metadata of the weights at `path`; no tensor data is read.

    Raises WeightsError, in one line, for whatever is not an ESM-2 model.
    """
    stamp = _stamp(path)
    if path.is_dir():
        metadata, infos, untrained = huggingface.read_metadata(path)
        return Weights(path, "huggingface", metadata, infos, untrained, stamp)
    archive = load_archive(path)
    _refuse_relatives(archive, path)
    state = _state_dict(archive, path)
    cfg = _cfg(archive)
    metadata = {key: cfg[word] for key, word in _CFG_WORDS.items() if word in cfg}
    infos = {name: tensor_info(name, tensor, path) for name, tensor in state.items()}
    refuse_inflated(state, path)
    return Weights(path, "fair-esm", metadata, infos, cfg.get("untrained") is True, stamp)


def _stamp(path: Path) -> tuple[object, ...]:
    """Return what changes when a file, or a file of a folder, is written or replaced."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return files_stamp(file for file in files if file.is_file())


def _cfg(archive: Mapping[str, Any]) -> dict[str, object]:
    cfg = archive.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else getattr(cfg, "model", None)
    if isinstance(model, argparse.Namespace):
        return dict(vars(model))
    return model if isinstance(model, dict) else {}


def _state_dict(archive: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    state = archive.get("model", archive)
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: its 'model' is a {type(state).__name__}, not a state dict")
    tensors = {
        _PREFIX.sub("", name): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def _refuse_relatives(archive: Mapping[str, Any], path: Path) -> None:
    """Refuse the other models of the family by what only they have."""
    args = archive.get("args")
    arch = str(getattr(args, "arch", "")) if isinstance(args, argparse.Namespace) else ""
    names = " ".join(_state_dict(archive, path))
    relatives = {
        "ESM-IF": ("invariant_gvp" in arch, r"\S*gvp\S*|\S*W_v\.\S*|\S*embed_confidence\S*"),
        "MSA Transformer": (
            arch == "msa_transformer",
            r"msa_position_embedding|\S*row_self_attention\S*",
        ),
        "ESM-1b or ESM-1v": (arch == "roberta_large", r"embed_positions\.weight"),
        "ESM-1": (arch == "protein_bert_base", r"embed_out\b\S*"),
    }
    for relative, (by_arch, marker) in relatives.items():
        found = re.search(marker, names)
        if by_arch or found:
            what = f"arch {arch}" if by_arch else f"tensor {found[0] if found else ''}"
            raise WeightsError(f"{path}: an {relative} model ({what}), not ESM-2")
