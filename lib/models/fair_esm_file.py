"""fair-esm's format: a .pt file, which is a zip archive that torch.save wrote.

The archive holds `cfg` (an argparse.Namespace) and `model` (a state dict). It is mapped, never
read as a whole, and unpickled with weights_only=True; argparse.Namespace is the only name that its
pickle may ask for besides tensors.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lib.errors import WeightsError
from lib.files import file_sha256
from lib.models.regression import regression_path
from lib.models.torch_archive import load_archive, refuse_inflated, tensor_info
from lib.models.weights import Stamp, TensorInfo, Weights, refuse_if_restamped, stamp_of

__all__ = ["FairEsmFile"]

_PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")
# What fair-esm calls the properties, in cfg["model"].
_CFG_WORDS = {
    "num_layers": "encoder_layers",
    "hidden_dim": "encoder_embed_dim",
    "attention_heads": "encoder_attention_heads",
    "token_dropout": "token_dropout",
}


@dataclass(frozen=True)
class FairEsmFile:
    """Weights in fair-esm's format, of which only metadata has been read."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    untrained: bool
    stamp: Stamp
    format: ClassVar[str] = "fair-esm"

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Return whether `path` is a file: only this format is one."""
        return not path.is_dir()

    @classmethod
    def open(cls, path: Path) -> FairEsmFile:
        """Read the metadata; raises WeightsError if the file does not hold an ESM-2 model."""
        stamp = stamp_of([path])
        archive = load_archive(path)
        state = _state_dict(archive, path)
        _refuse_relatives(archive, state, path)
        cfg = _cfg(archive)
        metadata = {key: cfg[word] for key, word in _CFG_WORDS.items() if word in cfg}
        tensors = {name: tensor_info(name, tensor, path) for name, tensor in state.items()}
        refuse_inflated(state, path)
        return cls(path, metadata, tensors, cfg.get("untrained") is True, stamp)

    @property
    def regression_file(self) -> Path:
        """Where fair-esm looks for the contact regression: a file beside this one."""
        return regression_path(self.path)

    @property
    def unadapted(self) -> Weights:
        """These weights."""
        return self

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the file is no longer the one whose metadata was read."""
        refuse_if_restamped(self.path, self.stamp, stamp_of([self.path]))

    def sha256(self) -> str:
        """Return the SHA-256 of the file, as `sha256sum` prints it; raises OSError."""
        return file_sha256(self.path)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored; the tensors are views of a mapping of the file."""
        state = _state_dict(load_archive(self.path), self.path)
        for name in names:
            yield name, state[name]


def _cfg(archive: Mapping[str, Any]) -> dict[str, object]:
    cfg = archive.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else getattr(cfg, "model", None)
    if isinstance(model, argparse.Namespace):
        return dict(vars(model))
    return model if isinstance(model, dict) else {}


def _state_dict(archive: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an archive, or of one that is a state dict itself."""
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


def _refuse_relatives(archive: Mapping[str, Any], state: Iterable[str], path: Path) -> None:
    """Refuse the other models of the family, each by something that only it has."""
    args = archive.get("args")
    arch = str(getattr(args, "arch", "")) if isinstance(args, argparse.Namespace) else ""
    names = " ".join(state)
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
        tensor = re.search(marker, names)
        if by_arch or tensor:
            evidence = f"arch {arch}" if by_arch else f"tensor {tensor[0] if tensor else ''}"
            raise WeightsError(f"{path}: an {relative} model ({evidence}), not ESM-2")
