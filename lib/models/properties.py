"""Properties: what each source says of a model's shape, and the shape that they agree on.

The sources are config.ini (an override), the metadata of the weights, the names and shapes of
their tensors, and the catalog for a released name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lib.catalog import RELEASED, ReleasedModel
from lib.errors import SettingsError, WeightsError
from lib.models.trunk import shape_in_tensors
from lib.models.weights import Weights
from lib.units import in_words
from schema.esm2_config import ModelShape
from schema.settings import ModelSettings

__all__ = ["CATALOG_ALONE", "Property", "catalog_shape", "find_shape"]

_KEYS = tuple(field.name for field in fields(ModelShape))
_OVERRIDE, _METADATA, _TENSORS, _CATALOG = (
    "override",
    "checkpoint metadata",
    "tensor shapes",
    "catalog",
)
CATALOG_ALONE = "catalog (weights not on disk)"


@dataclass(frozen=True)
class Property:
    """A detected value and its source, in words."""

    value: object
    source: str


def find_shape(
    weights: Weights, model: ModelSettings, released: ReleasedModel | None
) -> tuple[ModelShape, dict[str, str]]:
    """Return the shape that all sources agree on, and the sources of each of its properties.

    Raises WeightsError if two sources differ, or if no source but config.ini knows a property and
    config.ini does not give all of them; SettingsError if config.ini contradicts the tensors.
    """
    in_tensors = shape_in_tensors(weights)
    found: dict[str, Property] = {}
    missing = []
    for key in _KEYS:
        statements = {
            _OVERRIDE: getattr(model, key),
            _METADATA: _in_metadata(weights, key),
            _TENSORS: in_tensors.get(key),
            _CATALOG: getattr(released.shape, key) if released else None,
        }
        said = {source: value for source, value in statements.items() if value is not None}
        if said:
            found[key] = _agreed(weights.path, key, said)
        if not said.keys() - {_OVERRIDE}:
            missing.append(key)
    unsaid = [key for key in _KEYS if getattr(model, key) is None]
    if missing and unsaid:
        raise WeightsError(
            f"{weights.path}: {', '.join(missing)} not found in the weights, and config.ini does "
            f"not give every property (it lacks {', '.join(unsaid)})"
        )
    values: dict[str, Any] = {key: found[key].value for key in _KEYS}
    return ModelShape(**values), {key: found[key].source for key in _KEYS}


def catalog_shape(model: ModelSettings) -> ModelShape:
    """Return the shape of a released name; raises SettingsError if config.ini contradicts it."""
    shape = RELEASED[model.esm_model].shape
    for key in _KEYS:
        override, value = getattr(model, key), getattr(shape, key)
        if override is not None and override != value:
            raise SettingsError(
                f"[model] {key} = {in_words(override)} contradicts {model.esm_model}: "
                f"{in_words(value)}"
            )
    return shape


def _agreed(path: Path, key: str, said: Mapping[str, object]) -> Property:
    """Return the value on which the sources in `said` agree; raises if they do not."""
    if _OVERRIDE in said and _TENSORS in said and said[_OVERRIDE] != said[_TENSORS]:
        raise SettingsError(
            f"[model] {key} = {in_words(said[_OVERRIDE])} contradicts the tensors of {path}: "
            f"{in_words(said[_TENSORS])}"
        )
    # An override may correct metadata, but neither tensors nor the catalog of a released name.
    silent = _METADATA if _OVERRIDE in said else None
    heard = {source: value for source, value in said.items() if source != silent}
    first = next(iter(heard))
    for source, value in heard.items():
        if value != heard[first]:
            raise WeightsError(
                f"{path}: {key} is {in_words(heard[first])} by {first}, "
                f"{in_words(value)} by {source}"
            )
    return Property(heard[first], ", ".join(heard))


def _in_metadata(weights: Weights, key: str) -> object:
    """Return what the weights' metadata says of `key`; a value of the wrong kind is an error."""
    value = weights.metadata.get(key)
    if value is None:
        return None
    if key == "token_dropout":
        good = isinstance(value, bool)
    else:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not good:
        raise WeightsError(f"{weights.path}: metadata has {key} = {str(value)[:80]!r}")
    return value
