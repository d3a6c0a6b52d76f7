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
from lib.models.candidate import Candidate
from lib.models.held_file import HeldFile
from lib.models.regression import regression_path
from lib.models.tensor_file import tensors_in
from lib.models.torch_archive import load_archive, refuse_inflated, tensor_info
from lib.models.weights import TensorInfo, Weights

__all__ = ["FairEsmFile", "refuse_relatives"]

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
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
    """Weights in fair-esm's format, of which only metadata has been read.

    stored: the names that the file gives to its tensors, by names without prefix.
    """

    file: HeldFile
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]
    untrained: bool
    format: ClassVar[str] = "fair-esm"
    # fair-esm reads no more of cfg than what is read here.
    unknown_keys: ClassVar[tuple[str, ...]] = ()
    left_out: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def recognises(cls, candidate: Candidate) -> bool:
        """Return whether it is a file, which no other format has recognised."""
        return not candidate.path.is_dir()

    @classmethod
    def reads(cls, archive: Mapping[str, Any]) -> bool:
        """Return whether fair-esm's token embedding is where this format has it."""
        state = archive.get("model", archive)
        names = (name for name in state if isinstance(name, str)) if isinstance(state, dict) else ()
        return any(_PREFIX.sub("", name) == _EMBEDDING for name in names)

    @classmethod
    def open(cls, candidate: Candidate) -> FairEsmFile:
        """Read the metadata; raises WeightsError if the file does not hold an ESM-2 model."""
        path, file, archive = candidate.path, candidate.file, candidate.archive
        state = _state_dict(archive, path)
        stored = _without_prefixes(state, path)
        refuse_relatives(archive, stored, path)
        cfg = _cfg(archive)
        metadata = {key: cfg[word] for key, word in _CFG_WORDS.items() if word in cfg}
        tensors = {name: tensor_info(name, state[key], path) for name, key in stored.items()}
        refuse_inflated(state.values(), file)
        return cls(file, metadata, tensors, stored, cfg.get("untrained") is True)

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def regression_file(self) -> Path:
        """Where fair-esm looks for the contact regression: a file beside this one."""
        return regression_path(self.path)

    @property
    def unadapted(self) -> Weights:
        """These weights."""
        return self

    def stored_name(self, name: str) -> str:
        """Return what the file calls a tensor, or would call it, with the prefix of its trunk."""
        trunk = next((one for one in self.stored if one.startswith(("layers.", "embed_"))), "")
        return self.stored.get(name, self.stored.get(trunk, "").removesuffix(trunk) + name)

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the file is no longer the one whose metadata was read."""
        self.file.refuse_if_changed()

    def sha256(self) -> str:
        """Return the SHA-256 of the file, as `sha256sum` prints it; raises OSError."""
        return self.file.sha256()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored; the tensors are views of a mapping of the file."""
        state = _state_dict(load_archive(self.file), self.path)
        for name in names:
            if name == _EMBEDDING:
                self._refuse_untied(state)
            yield name, state[self.stored[name]]

    def _refuse_untied(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise WeightsError if the head's weights are not those of the embedding.

        fair-esm has one tensor for both, and loads the head's into it.
        """
        one, head = self.stored[_EMBEDDING], self.stored.get(_HEAD)
        if head is not None and not torch.equal(state[one], state[head]):
            raise WeightsError(f"{self.path}: {head} differs from {one}, fair-esm has one for both")


def _cfg(archive: Mapping[str, Any]) -> dict[str, object]:
    cfg = archive.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else getattr(cfg, "model", None)
    if isinstance(model, argparse.Namespace):
        return dict(vars(model))
    return model if isinstance(model, dict) else {}


def _state_dict(archive: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an archive, or of one that is a state dict itself, by stored name."""
    state = archive.get("model", archive)
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: its 'model' is a {type(state).__name__}, not a state dict")
    tensors = tensors_in(state)
    if tensors:
        return tensors
    keys = [str(key) for key, value in archive.items() if tensors_in(value)]
    if keys:
        raise WeightsError(f"{path}: no token embedding in {', '.join(keys)}: not an ESM-2 model")
    raise WeightsError(f"{path}: holds no tensors")


def _without_prefixes(state: Iterable[str], path: Path) -> dict[str, str]:
    """Return stored names by the names without prefix, of which there may be no two."""
    stored: dict[str, str] = {}
    for key in state:
        name = _PREFIX.sub("", key)
        if name in stored:
            raise WeightsError(f"{path}: two tensors are {name}: {stored[name]} and {key}")
        stored[name] = key
    return stored


def refuse_relatives(archive: Mapping[str, Any], state: Iterable[str], path: Path) -> None:
    """Refuse the other models of the family, each by something that only it has.

    archive: what torch.save wrote; state: names of tensors. Raises WeightsError.
    """
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
