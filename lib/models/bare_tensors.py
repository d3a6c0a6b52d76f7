"""Bare tensors: a whole model in one file without a configuration, as people save their own.

A .safetensors file, or a state dict by torch.save: alone, or in a dictionary, as under `state_dict`
(Lightning) or `model_state_dict`. The tensors are those of fair-esm's ESM2 or of
transformers' EsmModel, perhaps within another module, whose name is before theirs. Their names and
shapes tell everything but token dropout, and without rotary frequencies the number of heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from lib.errors import WeightsError
from lib.models.candidate import Candidate
from lib.models.fair_esm_file import FairEsmFile, refuse_relatives
from lib.models.held_file import HeldFile
from lib.models.regression import regression_path
from lib.models.stored import ROTARY, StoredTensor, with_rotary_of_every_layer
from lib.models.tensor_file import read_stored, stored_tensors, tensors_in
from lib.models.tensor_names import HEADS, fair_esm_name, hugging_face_name
from lib.models.weights import TensorInfo, Weights

__all__ = ["SafetensorsFile", "StateDictFile"]

# The token embedding, which a trunk has once; before it stands what is before all of the trunk.
_EMBEDDING = re.compile(
    r"(?P<prefix>(?:.+\.)?)(?P<name>embed_tokens|embeddings\.word_embeddings)\.weight"
)
_OF_FAIR_ESM = "embed_tokens"
# What transformers calls the files of a folder.
_OF_A_FOLDER = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_POSITIONS = "embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class _BareTensors:
    """What both formats share: the trunk found among the tensors of a file.

    key: where the state dict is in the file. prefix: what is before the names of the trunk's
    tensors. by_transformers: whether the trunk has transformers' names. stored: its tensors by
    fair-esm's names. left_out: modules beside the trunk, but for heads that are known by name.
    """

    file: HeldFile
    key: str | None
    prefix: str
    by_transformers: bool
    stored: Mapping[str, StoredTensor]
    left_out: tuple[str, ...]
    format: ClassVar[str]
    metadata: ClassVar[Mapping[str, object]] = {}
    untrained: ClassVar[bool] = False
    unknown_keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _read(cls, file: HeldFile, key: str | None) -> Self:
        _refuse_part_of_a_folder(file.path)
        tensors = stored_tensors(file, key)
        prefix, by_transformers = _trunk_in(tensors, file.path)
        stored: dict[str, StoredTensor] = {}
        for stored_as, info in tensors.items():
            if not stored_as.startswith(prefix):
                continue
            name = stored_as.removeprefix(prefix)
            name = fair_esm_name(name) if by_transformers else name
            if name in stored:
                raise WeightsError(
                    f"{file.path}: two tensors are {name}: {stored[name].name} and {stored_as}"
                )
            stored[name] = StoredTensor(file, stored_as, info)
        stored = with_rotary_of_every_layer(stored, file.path)
        _refuse_absolute_positions(stored, file.path)
        beside = (name for name in tensors if not name.startswith(prefix))
        return cls(file, key, prefix, by_transformers, stored, _modules(beside, prefix))

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def regression_file(self) -> Path | None:
        """None: the contact regression is only among the tensors."""
        return None

    @property
    def unadapted(self) -> Weights:
        """These weights."""
        return self

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the trunk."""
        return {name: stored.info for name, stored in self.stored.items()}

    def stored_name(self, name: str) -> str:
        """Return what the file calls a tensor, or would call it."""
        if name in self.stored:
            return self.stored[name].name
        known = hugging_face_name(name).removeprefix("esm.") if self.by_transformers else name
        return f"{self.prefix}{known}"

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the file is no longer the one whose metadata was read."""
        self.file.refuse_if_changed()

    def sha256(self) -> str:
        """Return the SHA-256 of the file, as `sha256sum` prints it; raises OSError."""
        return self.file.sha256()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.stored[name].name, []).append(name)
        for stored_as, tensor in read_stored(self.file, wanted.__contains__, self.key):
            for name in wanted[stored_as]:
                yield name, tensor


@dataclass(frozen=True)
class SafetensorsFile(_BareTensors):
    """A .safetensors file that no folder's config.json describes."""

    format: ClassVar[str] = "safetensors"

    @classmethod
    def recognises(cls, candidate: Candidate) -> bool:
        """Return whether it is a file with this suffix."""
        return candidate.path.suffix == ".safetensors" and not candidate.path.is_dir()

    @classmethod
    def open(cls, candidate: Candidate) -> SafetensorsFile:
        """Read the metadata; raises WeightsError if the file does not hold a whole ESM-2 model."""
        found = cls._read(candidate.file, None)
        refuse_relatives({}, found.stored, candidate.path)
        return found


@dataclass(frozen=True)
class StateDictFile(_BareTensors):
    """A state dict that torch.save wrote, alone or in a dictionary; not what FairEsmFile reads."""

    format: ClassVar[str] = "state-dict"

    @classmethod
    def recognises(cls, candidate: Candidate) -> bool:
        """Return whether it is a dictionary with a trunk that FairEsmFile does not read."""
        if candidate.path.is_dir():
            return False
        try:
            archive = candidate.archive
        except WeightsError:
            return False
        return not FairEsmFile.reads(archive) and bool(_keys_in(archive))

    @classmethod
    def open(cls, candidate: Candidate) -> StateDictFile:
        """Read the metadata; raises WeightsError if the file does not hold a whole ESM-2 model."""
        path, archive = candidate.path, candidate.archive
        keys = _keys_in(archive)
        if len(keys) != 1:
            raise WeightsError(f"{path}: state dicts of ESM-2 in {_listed(keys)}: not one")
        found = cls._read(candidate.file, keys[0])
        refuse_relatives(archive, found.stored, path)
        return found

    @property
    def regression_file(self) -> Path:
        """Where fair-esm looks for the contact regression: a file beside this one."""
        return regression_path(self.path)


def _refuse_part_of_a_folder(path: Path) -> None:
    """Refuse a file of a Hugging Face folder, whose config.json says more of the model."""
    if _OF_A_FOLDER.fullmatch(path.name) and (path.parent / "config.json").exists():
        raise WeightsError(f"{path}: part of the model that config.json of its folder describes")


def _keys_in(archive: Mapping[str, Any]) -> list[str | None]:
    """Return the keys of the state dicts that have a trunk; None for an archive that is one."""
    states: dict[str | None, object] = {None: archive}
    states |= {key: value for key, value in archive.items() if isinstance(key, str)}
    return [
        key for key, state in states.items() if any(map(_EMBEDDING.fullmatch, tensors_in(state)))
    ]


def _listed(keys: Iterable[str | None]) -> str:
    return ", ".join("the whole" if key is None else key for key in keys) or "nothing"


def _trunk_in(names: Iterable[str], path: Path) -> tuple[str, bool]:
    """Return what is before the names of the trunk, and whether they are transformers'."""
    names = list(names)
    lora = next((name for name in names if ".lora_" in name), None)
    if lora is not None:
        raise WeightsError(f"{path}: tensor {lora}: a LoRA adapter that is not merged")
    found = [match for match in map(_EMBEDDING.fullmatch, names) if match]
    if not found:
        raise WeightsError(
            f"{path}: no tensor embed_tokens.weight or embeddings.word_embeddings.weight: not an "
            "ESM-2 model"
        )
    if len(found) > 1:
        raise WeightsError(
            f"{path}: two tensors are a token embedding: {found[0][0]} and {found[1][0]}"
        )
    return found[0]["prefix"], found[0]["name"] != _OF_FAIR_ESM


def _refuse_absolute_positions(stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse what transformers writes for a model without rotary positions.

    It writes both tensors for a model with them, or the frequencies alone.
    """
    if _POSITIONS in stored and not any(name.endswith(ROTARY) for name in stored):
        raise WeightsError(
            f"{path}: tensor {stored[_POSITIONS].name} without rotary frequencies (inv_freq): not "
            "an ESM-2 model"
        )


def _modules(beside: Iterable[str], prefix: str) -> tuple[str, ...]:
    """Return the outermost modules of tensors beside the trunk, but for known heads."""
    outer, modules = prefix.split("."), set()
    for name in beside:
        parts = name.split(".")
        if HEADS.isdisjoint(parts):
            pairs = zip(parts, outer, strict=False)
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            modules.add(".".join(parts[: shared + 1]))
    return tuple(sorted(modules))
