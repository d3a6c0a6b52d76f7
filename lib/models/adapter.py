"""LoRA adapters as PEFT saves them, merged into their base tensor by tensor as they are read.

Hu et al. 2021 (doi:10.48550/arXiv.2106.09685): a matrix W (out, in) becomes W + s B A, with
A (r, in), B (out, r) and s = alpha / r, or alpha / sqrt(r) with rsLoRA; in float32.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lib.catalog import RELEASED
from lib.errors import WeightsError
from lib.files import file_sha256, files_stamp, listing_sha256
from lib.models.huggingface import fair_esm_name, read_json, stored_tensors, tensors_of
from lib.models.torch_archive import TensorInfo
from lib.models.weights import Weights
from schema.settings import ModelSettings

__all__ = [
    "Adapter",
    "is_adapter",
    "merge_at_read",
    "read_adapter",
    "refuse_contact_head",
    "with_base",
]

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What says nothing about the merged tensors, or is read below; anything else that is set makes
# another adapter than a plain LoRA.
_UNDERSTOOD = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Other ways to initialise change the base as well.
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight\Z")
# Of a model with a head; the embedding trunk has none of them.
_HEADS = ("classifier", "contact_head", "lm_head", "pooler", "qa_outputs", "score")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, of which only metadata has been read.

    `factors` holds, by the fair-esm name of the tensor they change, the stored names of A and B
    and the scale; `replacements` the stored names of tensors (biases, modules_to_save) that stand
    instead of the base's.
    """

    folder: Path
    file: Path
    base_name: str | None
    factors: Mapping[str, tuple[str, str, float]]
    replacements: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    stamp: tuple[object, ...]


@dataclass(frozen=True)
class _AdaptedWeights(Weights):
    """Weights of a base as an adapter changes them."""

    base: Weights
    adapter: Adapter

    @property
    def unadapted(self) -> Weights:
        """The base."""
        return self.base

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if base or adapter are not those whose metadata was read."""
        self.base.refuse_if_changed()
        if _stamp(self.adapter.folder, self.adapter.file) != self.stamp:
            raise WeightsError(f"{self.path}: changed while it was being read")

    def sha256(self) -> str:
        """Return the SHA-256 of a `sha256sum` listing of both files, and of the base as `base`."""
        paths = (self.adapter.folder / _CONFIG, self.adapter.file)
        own = [(file_sha256(path), path.name) for path in paths]
        return listing_sha256([*own, (self.base.sha256(), "base")])

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor): float32 where the adapter changes it, as stored elsewhere."""
        names = list(names)
        factors = [self.adapter.factors[name] for name in names if name in self.adapter.factors]
        stored = {part for a, b, _ in factors for part in (a, b)}
        stored |= {self.adapter.replacements.get(name, "") for name in names}
        parts = dict(tensors_of(self.adapter.file, lambda name: name in stored))
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


def is_adapter(path: Path) -> bool:
    """Return whether a path is a folder with an adapter_config.json."""
    return (path / _CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration and what it stores; no tensor data is read.

    Raises WeightsError for anything but a plain LoRA.
    """
    stored = [folder / name for name in _FILES if (folder / name).is_file()]
    if not stored:
        raise WeightsError(f"{folder}: {_CONFIG} without {' or '.join(_FILES)}")
    stamp = _stamp(folder, stored[0])
    config = read_json(folder / _CONFIG)
    _refuse_other_kinds(config, folder)
    tensors = stored_tensors(stored[0])
    saved = config.get("modules_to_save") or []
    factors: dict[str, dict[str, str]] = {}
    replacements = {}
    for name in tensors:
        module = name.removeprefix("base_model.model.")
        part = _LORA.match(module)
        if _is_of_a_head(module, saved):
            continue
        if part:
            factors.setdefault(part[1], {})[part[2]] = name
        elif ".lora_" in module:
            raise WeightsError(f"{stored[0]}: tensor {name}: no factor of a linear module")
        else:
            replacements[fair_esm_name(module.replace(".base_layer.", "."))] = name
    scaled = {}
    for module, pair in factors.items():
        if len(pair) < 2:
            (name,) = pair.values()
            raise WeightsError(f"{stored[0]}: tensor {name} has no counterpart")
        rank = _rank(pair, tensors, stored[0])
        scale = _scale(config, module, rank, folder)
        scaled[fair_esm_name(f"{module}.weight")] = (pair["A"], pair["B"], scale)
    if not scaled and not replacements:
        raise WeightsError(f"{stored[0]}: holds no tensor of an embedding trunk")
    base = config.get("base_model_name_or_path")
    return Adapter(
        folder, stored[0], str(base) if base else None, scaled, replacements, tensors, stamp
    )


def refuse_contact_head(adapter: Adapter) -> None:
    """Raise WeightsError if an adapter stores a contact head: contacts are those of its base's."""
    for name in adapter.tensors:
        if ".contact_head." in name:
            raise WeightsError(f"{adapter.file}: tensor {name}: of a contact head of its own")


def with_base(model: ModelSettings, adapter: Adapter) -> tuple[ModelSettings, str]:
    """Return the settings of an adapter's base, and who names it.

    A base is a released name, with or without `facebook/` before it, or a path (in
    adapter_config.json, relative to its folder). Raises WeightsError if nothing names it, or if
    [model] base_model and adapter_config.json name two whose last parts differ.
    """
    said, named = model.base_model, adapter.base_name
    if said is not None:
        if named is not None and _last_part(named) != _last_part(said):
            raise WeightsError(
                f"{adapter.folder}: base_model_name_or_path {named!r} contradicts [model] "
                f"base_model = {said}"
            )
        return replace(model, esm_model=said), "config"
    if named is None:
        raise WeightsError(
            f"{adapter.folder}: {_CONFIG} has no base_model_name_or_path and config.ini no "
            "[model] base_model"
        )
    released = named.removeprefix("facebook/")
    path = adapter.folder / named
    if released not in RELEASED and not _exists(path):
        raise WeightsError(
            f"{adapter.folder}: base_model_name_or_path {named!r} is neither a released model nor "
            "a path that exists"
        )
    chosen = released if released in RELEASED else str(path)
    return replace(model, esm_model=chosen), _CONFIG


def merge_at_read(base: Weights, adapter: Adapter) -> Weights:
    """Return the base's weights as the adapter changes them.

    Raises WeightsError for a tensor of the adapter that fits none of the base's.
    """
    for name, (a, b, _) in adapter.factors.items():
        shape = adapter.tensors[b].shape[0], adapter.tensors[a].shape[1]
        _check_fit(base, adapter, name, a, shape)
    for name, stored in adapter.replacements.items():
        _check_fit(base, adapter, name, stored, adapter.tensors[stored].shape)
    return _AdaptedWeights(
        adapter.folder,
        f"{base.format}+lora",
        base.metadata,
        base.tensors,
        base.untrained,
        adapter.stamp,
        base,
        adapter,
    )


def _check_fit(
    base: Weights, adapter: Adapter, name: str, stored: str, shape: tuple[int, ...]
) -> None:
    there = base.tensors.get(name)
    if there is None:
        raise WeightsError(f"{adapter.file}: tensor {stored} fits no module of {base.path}")
    if there.shape != shape:
        raise WeightsError(
            f"{adapter.file}: tensor {stored} is of a {shape} matrix or vector, {name} of "
            f"{base.path} has {there.shape}"
        )


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    where = folder / _CONFIG
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        raise WeightsError(f"{folder}: holds an adapter and a whole model")
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{where}: peft_type {config.get('peft_type')!r}, not 'LORA'")
    for key, value in config.items():
        if value and key not in _UNDERSTOOD:
            raise WeightsError(f"{where}: {key} = {str(value)[:80]}: no plain LoRA")
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise WeightsError(f"{where}: init_lora_weights = {str(init)[:80]}: changes its base")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise WeightsError(f"{where}: {key} is no object")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise WeightsError(f"{where}: modules_to_save is no list")


def _is_of_a_head(module: str, saved: list[Any]) -> bool:
    """Return whether a tensor belongs to a head: none of the trunk's, and saved or known as one."""
    first = module.removeprefix("esm.").partition(".")[0]
    return first in _HEADS or (first in saved and first not in ("esm", "encoder", "embeddings"))


def _rank(pair: Mapping[str, str], tensors: Mapping[str, TensorInfo], file: Path) -> int:
    a, b = tensors[pair["A"]], tensors[pair["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise WeightsError(f"{file}: tensor {pair['A']} has shape {a.shape}, its B {b.shape}")
    for info in (a, b):
        if info.dtype not in ("float32", "float16", "bfloat16"):
            raise WeightsError(f"{file}: tensor {pair['A']} or its B of type {info.dtype}")
    return a.shape[0]


def _scale(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """Return the scale of a module's product; raises WeightsError if its rank is not as said."""
    said = _by_pattern(config, "rank_pattern", module, config.get("r"), folder)
    if said != rank:
        raise WeightsError(f"{folder}: {module} has rank {rank}, {_CONFIG} says {said}")
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), folder)
    if (
        not isinstance(alpha, int | float)
        or isinstance(alpha, bool)
        # JSON may hold numbers that no float can, and infinity.
        or not abs(alpha) <= sys.float_info.max
    ):
        raise WeightsError(f"{folder}: {_CONFIG} has lora_alpha {alpha!r:.80} for {module}")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(
    config: Mapping[str, Any], key: str, module: str, default: object, folder: Path
) -> object:
    """Return the value of the first pattern that a module's name ends with, as PEFT chooses it."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                found: object = value
                return found
        except re.error:
            raise WeightsError(f"{folder}: {_CONFIG} has the {key} {pattern!r}") from None
    return default


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _last_part(name: str) -> str:
    return Path(name).name.removesuffix(".pt")


def _stamp(folder: Path, file: Path) -> tuple[object, ...]:
    return files_stamp((folder / _CONFIG, file))
