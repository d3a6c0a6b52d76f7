"""LoRA adapters as PEFT saves them: a folder with adapter_config.json and a file of tensors.

Hu et al. 2021 (doi:10.48550/arXiv.2106.09685): an adapter holds, for each matrix that it changes, a
product B A of rank r and a scale alpha / r, or alpha / sqrt(r) with rsLoRA.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.catalog import RELEASED
from lib.errors import WeightsError
from lib.models.held_file import HeldFile
from lib.models.huggingface import WEIGHT_FILES
from lib.models.naming import model_name
from lib.models.tensor_file import stored_tensors
from lib.models.tensor_names import HEADS, fair_esm_name, is_of_trunk
from lib.models.vocabulary import refuse_other_numbers
from lib.models.weights import TensorInfo, read_json
from schema.settings import ModelSettings

__all__ = ["Adapter", "base_settings", "is_adapter", "read_adapter", "refuse_contact_head"]

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Keys that do not affect the merged tensors, or that are read below. Any other key, if it is set,
# makes the adapter something else than a plain LoRA. eva_config says how A was initialised. With
# ensure_weight_tying, a change of the embedding is stored under the embedding's own name too.
_UNDERSTOOD = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
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
# Any other way to initialise an adapter changes the base as well.
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight\Z")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, of which only metadata has been read.

    `factors` holds, by the fair-esm name of the tensor that they change, the stored names of A
    and B and the scale. `replacements` holds the stored names of tensors (biases,
    modules_to_save) that replace the base's. `tensors` has everything that is stored, by its
    stored name. `revision` is the one that PEFT would fetch of a base on the Hugging Face Hub.
    """

    folder: Path
    config: HeldFile
    file: HeldFile
    base_name: str | None
    revision: str | None
    factors: Mapping[str, tuple[str, str, float]]
    replacements: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the files are not those whose metadata was read."""
        self.config.refuse_if_changed()
        self.file.refuse_if_changed()

    def digests(self) -> list[tuple[str, str]]:
        """Return (SHA-256, name) of the configuration and of the tensors; raises OSError."""
        return [(file.sha256(), file.path.name) for file in (self.config, self.file)]


def is_adapter(path: Path) -> bool:
    """Return whether a path is a folder with an adapter_config.json.

    Raises WeightsError for a folder that may not be looked into.
    """
    try:
        return (path / _CONFIG).is_file()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration and the names and shapes of its tensors.

    Raises WeightsError for anything but a plain LoRA adapter.
    """
    stored = [folder / name for name in _FILES if (folder / name).is_file()]
    if not stored:
        raise WeightsError(f"{folder}: {_CONFIG} without {' or '.join(_FILES)}")
    config_file, file = HeldFile(folder / _CONFIG), HeldFile(stored[0])
    config = read_json(config_file)
    _refuse_other_kinds(config, folder)
    refuse_other_numbers(folder)
    tensors = stored_tensors(file)
    pairs, replacements = _sorted_out(tensors, config.get("modules_to_save") or [], file.path)
    factors = {
        fair_esm_name(f"{module}.weight"): _factor(config, module, pair, tensors, file.path)
        for module, pair in pairs.items()
    }
    if not factors and not replacements:
        raise WeightsError(f"{file.path}: holds no tensor of an embedding trunk")
    base, revision = (
        str(config[key]) if config.get(key) else None
        for key in ("base_model_name_or_path", "revision")
    )
    return Adapter(folder, config_file, file, base, revision, factors, replacements, tensors)


def refuse_contact_head(adapter: Adapter) -> None:
    """Raise WeightsError if an adapter stores a contact head: contacts use that of its base."""
    for name in adapter.tensors:
        if ".contact_head." in name:
            raise WeightsError(
                f"{adapter.file.path}: tensor {name} belongs to a contact head of the adapter's own"
            )


def base_settings(
    model: ModelSettings, adapter: Adapter, *, any_base: bool = False
) -> tuple[ModelSettings, str]:
    """Return the settings of an adapter's base, and which file names the base.

    A base is a released name, with or without `facebook/` before it, or a path. A relative path in
    adapter_config.json starts at the adapter's folder or at one above it, as that of its training,
    or its last part lies beside the adapter. any_base: the caller compares the digest, which covers
    the base, so that its name need not be the one in adapter_config.json.

    Raises WeightsError if no base is named or found, if adapter_config.json names both a released
    model and a local one, if [model] base_model is another model by its name, and for a revision
    of a released model that is not the known one.
    """
    said, named = model.base_model, adapter.base_name
    if said is None:
        chosen, source = _named_base(adapter), _CONFIG
    elif any_base or named is None or _is_called(said, named):
        chosen, source = said, "config"
    else:
        raise WeightsError(
            f"{adapter.folder}: base_model_name_or_path {named!r} contradicts [model] base_model = "
            f"{said}"
        )
    if chosen in RELEASED and not any_base:
        _refuse_other_revision(chosen, adapter)
    return replace(model, esm_model=chosen), source


def _is_called(path: str, name: str) -> bool:
    """Return whether the model at a path is the one that a name or another path means.

    A relative path to a numbered checkpoint may not say the folder that is part of its name.
    """
    found, wanted = model_name(Path(path)), model_name(Path(name)).removeprefix("../")
    return found == wanted or found.endswith(f"/{wanted}")


def _named_base(adapter: Adapter) -> str:
    """Return the released name or the path that adapter_config.json says."""
    named = adapter.base_name
    if named is None:
        raise WeightsError(
            f"{adapter.folder}: {_CONFIG} has no base_model_name_or_path and config.ini no "
            "[model] base_model"
        )
    places, released = _places(adapter.folder, named), named.removeprefix("facebook/")
    if released in RELEASED:
        # PEFT would read a folder of this name if it is started beside it, and the release if not.
        local = next(filter(_holds_a_model, places), None)
        if local is not None:
            raise WeightsError(
                f"{adapter.folder}: base_model_name_or_path {named!r} is a released model and also "
                f"{local}, and config.ini has no [model] base_model"
            )
        return released
    found = next(filter(_exists, places), None)
    if found is None:
        raise WeightsError(
            f"{adapter.folder}: base_model_name_or_path {named!r} is neither a released model nor "
            "a path that exists, and config.ini has no [model] base_model"
        )
    return str(found)


def _refuse_other_revision(released: str, adapter: Adapter) -> None:
    """Refuse a revision that is not the known one of a released base; `main` says nothing."""
    hub = RELEASED[released].hub
    known = hub.revision if hub else None
    if adapter.revision not in (None, "main", known):
        raise WeightsError(
            f"{adapter.folder / _CONFIG}: revision {adapter.revision!r:.80} of its base, that of "
            f"{released} is {known or 'not known'}"
        )


def _places(folder: Path, named: str) -> Iterator[Path]:
    """Yield where a base may lie that the adapter in `folder` names, the nearest first."""
    for start in (folder, *folder.parents[:-1]):  # not at the root, where any name may be
        yield start / named  # all the same if it is absolute
    if not Path(named).is_absolute():
        yield folder.parent / Path(named).name


def _refuse_other_kinds(config: Mapping[str, Any], folder: Path) -> None:
    where = folder / _CONFIG
    of_a_model = any((folder / name).is_file() for name in WEIGHT_FILES)
    if of_a_model and (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: holds an adapter and a whole model")
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{where}: peft_type {config.get('peft_type')!r}, not 'LORA'")
    for key, value in config.items():
        if value and key not in _UNDERSTOOD:
            raise WeightsError(f"{where}: {key} = {str(value)[:80]}: not a plain LoRA adapter")
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise WeightsError(f"{where}: init_lora_weights = {str(init)[:80]}: changes its base")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise WeightsError(f"{where}: {key} is not an object")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise WeightsError(f"{where}: modules_to_save is not a list")


def _sorted_out(
    stored: Mapping[str, TensorInfo], saved: list[Any], file: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the stored names of A and B by module, and those of replacements by fair-esm name.

    saved: the configuration's modules_to_save. Tensors of a head are left out.
    """
    pairs: dict[str, dict[str, str]] = {}
    replacements = {}
    for name in stored:
        module = name.removeprefix("base_model.model.")
        part = _LORA.match(module)
        if _is_of_a_head(module, saved):
            continue
        if part:
            pairs.setdefault(part[1], {})[part[2]] = name
        elif ".lora_" in module:
            raise WeightsError(f"{file}: tensor {name} is not a factor of a linear module")
        elif ".modules_to_save." in module:  # PEFT stores it so beside the one that it replaces
            raise WeightsError(f"{file}: tensor {name}: a bias twice, by bias and modules_to_save")
        else:
            replacements[fair_esm_name(module.replace(".base_layer.", "."))] = name
    return pairs, replacements


def _is_of_a_head(module: str, saved: list[Any]) -> bool:
    """Return whether a tensor belongs to a head: a known one, or a saved module off the trunk."""
    name = fair_esm_name(module)
    first = name.partition(".")[0]
    return first in HEADS or (first in saved and not is_of_trunk(name))


def _factor(
    config: Mapping[str, Any],
    module: str,
    pair: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    file: Path,
) -> tuple[str, str, float]:
    """Return the stored names of a module's A and B, and the scale of their product."""
    if len(pair) < 2:
        (name,) = pair.values()
        raise WeightsError(f"{file}: tensor {name} has no counterpart")
    scale = _scale(config, module, _rank(pair, tensors, file), file.parent)
    return pair["A"], pair["B"], scale


def _rank(pair: Mapping[str, str], tensors: Mapping[str, TensorInfo], file: Path) -> int:
    a, b = tensors[pair["A"]], tensors[pair["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise WeightsError(f"{file}: tensor {pair['A']} has shape {a.shape}, its B {b.shape}")
    for info in (a, b):
        if info.dtype not in ("float32", "float16", "bfloat16"):
            raise WeightsError(f"{file}: tensor {pair['A']} or its B of type {info.dtype}")
    return a.shape[0]


def _scale(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """Return the scale of a module's product.

    Raises WeightsError if the configuration gives another rank than `rank`, or no usable alpha.
    """
    said = _by_pattern(config, "rank_pattern", module, config.get("r"), folder)
    if said != rank:
        raise WeightsError(f"{folder}: {module} has rank {rank}, {_CONFIG} says {said}")
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), folder)
    if (
        not isinstance(alpha, int | float)
        or isinstance(alpha, bool)
        # JSON may hold infinity, and numbers too large for a float.
        or not abs(alpha) <= sys.float_info.max
    ):
        raise WeightsError(f"{folder}: {_CONFIG} has lora_alpha {alpha!r:.80} for {module}")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_pattern(
    config: Mapping[str, Any], key: str, module: str, default: object, folder: Path
) -> object:
    """Return the value of the first pattern that matches the end of a module's name, as in PEFT."""
    patterns: Mapping[str, object] = config.get(key) or {}
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise WeightsError(f"{folder}: {_CONFIG} has the {key} {pattern!r}") from None
    return default


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _holds_a_model(path: Path) -> bool:
    """Return whether there is a file, or a folder that transformers could load."""
    try:
        return path.is_file() or (path / "config.json").is_file()
    except OSError:
        return False
