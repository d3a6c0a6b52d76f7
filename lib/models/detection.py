"""Detection: the properties of a model, each with where it came from, from metadata alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.catalog import RELEASED, ReleasedModel, trunk_parameters, trunk_shapes
from lib.errors import SettingsError, WeightsError
from lib.models.adapter import (
    Adapter,
    is_adapter,
    merge_at_read,
    read_adapter,
    refuse_contact_head,
    with_base,
)
from lib.models.regression import Regression, read_regression, regression_path
from lib.models.weights import Weights, find_weights, open_weights
from schema.esm2_config import ESM2Config
from schema.settings import ModelSettings

__all__ = ["Detection", "Property", "detect", "select_layers"]

_KEYS = ("num_layers", "hidden_dim", "attention_heads", "token_dropout")
_FAR_MORE_LAYERS_THAN_ANY_ESM2 = 1000


@dataclass(frozen=True)
class Property:
    """A detected value and its source, in words."""

    value: object
    source: str


@dataclass(frozen=True)
class Detection:
    """What is known of a model before any of its tensors is read.

    `weights` is None for a released name that is not on disk: then the values are the
    catalog's. `released` is the released model that this is, or that it adapts. `regression` is
    there if contacts are to be predicted and it is on disk.
    """

    name: str
    weights: Weights | None
    properties: dict[str, Property]
    released: str | None = None
    regression: Regression | None = None

    def value(self, key: str) -> int:
        """Return the value of a whole-number property."""
        found = self.properties[key].value
        assert isinstance(found, int), key
        return found

    @property
    def repr_layers(self) -> tuple[int, ...]:
        """Layers to keep, ascending as asked for, all in 0 … num_layers."""
        layers = self.properties["repr_layers"].value
        assert isinstance(layers, tuple)
        return layers

    @property
    def untrained(self) -> bool:
        """Whether the weights say that they were made by scripts/make_model.py."""
        return self.weights is not None and self.weights.untrained

    def find_regression(self) -> Regression:
        """Read the contact regression of weights on disk; raises WeightsError if there is none."""
        assert self.weights is not None
        return read_regression(
            self.weights, self.value("num_layers"), self.value("attention_heads")
        )

    def config(self, sha256: str) -> ESM2Config:
        """Return the ESM2Config of weights on disk whose digest has been taken."""
        own = self.regression.sha256 or sha256 if self.regression else None
        return ESM2Config(
            name=self.name,
            num_layers=self.value("num_layers"),
            hidden_dim=self.value("hidden_dim"),
            attention_heads=self.value("attention_heads"),
            token_dropout=bool(self.properties["token_dropout"].value),
            repr_layers=self.repr_layers,
            parameters=self.value("parameters"),
            weights_format=str(self.properties["weights_format"].value),
            dtype=str(self.properties["dtype"].value),
            sha256=sha256,
            untrained=self.untrained,
            contact_regression_sha256=own,
        )


def detect(model: ModelSettings, *, contacts: bool = False) -> Detection:
    """Detect the chosen model: metadata and tensor shapes, checked against catalog and config.

    contacts: whether they are to be predicted; then weights without a contact regression are
    refused, but for a released name, whose regression can be downloaded.

    Raises WeightsError if the weights are no complete ESM-2 model or a property is missing,
    SettingsError if config.ini contradicts them or asks for a layer they do not have.
    """
    path = find_weights(model)
    if path is not None and is_adapter(path):
        adapter = read_adapter(path)
        if contacts:
            refuse_contact_head(adapter)
        found = _detect_adapted(model, adapter)
    else:
        found = _detect_whole(model, path)
    return _with_regression(found) if contacts and found.weights is not None else found


def _detect_adapted(model: ModelSettings, adapter: Adapter) -> Detection:
    """Detect a LoRA adapter's base, and lay the adapter over it."""
    base_settings, source = with_base(model, adapter)
    path = find_weights(base_settings)
    if path is not None and is_adapter(path):
        raise WeightsError(f"{adapter.folder}: its base {path} is an adapter itself")
    base = _detect_whole(base_settings, path)
    name = adapter.folder.resolve().name
    if base.weights is None:
        return replace(base, name=name)
    weights = merge_at_read(base.weights, adapter)
    found = dict(base.properties)
    found["weights_format"] = Property(weights.format, "file")
    found["base"] = Property(str(base.weights.path), source)
    return replace(base, name=name, weights=weights, properties=found)


def _with_regression(detection: Detection) -> Detection:
    """Show where the contact regression lies; refuse weights without one."""
    assert detection.weights is not None
    path = regression_path(detection.weights.unadapted.path)
    if detection.released is not None and not path.exists():
        regression, place = None, Property(f"{path} (not on disk)", "catalog")
    else:
        regression = detection.find_regression()
        place = Property(str(regression.path), "file")
    properties = detection.properties | {"contact_regression": place}
    return replace(detection, properties=properties, regression=regression)


def _detect_whole(model: ModelSettings, path: Path | None) -> Detection:
    released = RELEASED.get(model.esm_model)
    if path is None:
        assert released is not None
        return _from_catalog(model, released)
    weights = open_weights(path)
    overrides = {key: getattr(model, key) for key in _KEYS}
    found = _properties(weights, overrides, released)
    num_layers, hidden_dim = found["num_layers"].value, found["hidden_dim"].value
    assert isinstance(num_layers, int)
    assert isinstance(hidden_dim, int)
    _check_heads(hidden_dim, found["attention_heads"].value)
    _check_trunk(weights, num_layers, hidden_dim)
    found["repr_layers"] = _repr_layers(model.repr_layers, num_layers, released)
    found["parameters"] = Property(trunk_parameters(num_layers, hidden_dim), "tensor shapes")
    found["weights_format"] = Property(weights.format, "file")
    found["dtype"] = Property(_dtype(weights, num_layers, hidden_dim), "tensors")
    name = model.esm_model if released else path.name.removesuffix(".pt")
    return Detection(name, weights, found, model.esm_model if released else None)


def select_layers(asked: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return `asked` with negative layers counted from the end, as fair-esm's extract does.

    0 is the embedding, num_layers or -1 the last layer. Raises SettingsError for a layer that
    does not exist or stands twice.
    """
    chosen: dict[int, int] = {}
    for layer in asked:
        index = layer + num_layers + 1 if layer < 0 else layer
        if layer > num_layers:
            raise SettingsError(f"repr_layer {layer} exceeds model depth {num_layers}")
        if index < 0:
            raise SettingsError(
                f"repr_layer {layer} is before the first: model depth {num_layers} ends at "
                f"{-num_layers - 1}"
            )
        if index in chosen:
            raise SettingsError(f"repr_layers {chosen[index]} and {layer} are the same layer")
        chosen[index] = layer
    return tuple(chosen)


def _from_catalog(model: ModelSettings, released: ReleasedModel) -> Detection:
    catalog = "catalog (weights not on disk)"
    found = {}
    for key in _KEYS:
        override, value = getattr(model, key), getattr(released, key)
        if override is not None and override != value:
            raise SettingsError(
                f"[model] {key} = {_said(override)} contradicts {model.esm_model}: {_said(value)}"
            )
        found[key] = Property(value, catalog)
    found["repr_layers"] = _repr_layers(model.repr_layers, released.num_layers, released)
    found["parameters"] = Property(released.parameters, catalog)
    return Detection(model.esm_model, None, found, model.esm_model)


def _properties(
    weights: Weights, overrides: dict[str, object], released: ReleasedModel | None
) -> dict[str, Property]:
    shapes = _from_shapes(weights)
    found: dict[str, Property] = {}
    missing = []
    for key in _KEYS:
        by_metadata = _sane(weights, key)
        by_shape = shapes.get(key)
        override = overrides[key]
        if override is not None and by_shape is not None and override != by_shape:
            raise SettingsError(
                f"[model] {key} = {_said(override)} contradicts the tensors of {weights.path}: "
                f"{_said(by_shape)}"
            )
        by_catalog = getattr(released, key) if released else None
        sources = {
            "override": override,
            "checkpoint metadata": by_metadata,
            "tensor shapes": by_shape,
            "catalog": by_catalog,
        }
        known = {source: value for source, value in sources.items() if value is not None}
        # An override may correct metadata, never tensors or the catalog of a released name.
        if override is not None:
            known.pop("checkpoint metadata", None)
        if not known:
            missing.append(key)
            continue
        first = next(iter(known))
        for source, value in known.items():
            if value != known[first]:
                raise WeightsError(
                    f"{weights.path}: {key} is {_said(known[first])} by {first}, "
                    f"{_said(value)} by {source}"
                )
        if set(known) == {"override"} and by_metadata is None:
            missing.append(key)
        found[key] = Property(known[first], ", ".join(known))
    unsaid = [key for key in _KEYS if overrides[key] is None]
    if missing and unsaid:
        raise WeightsError(
            f"{weights.path}: {', '.join(missing)} not found in the weights, and config.ini does "
            f"not give every property (it lacks {', '.join(unsaid)})"
        )
    return found


def _sane(weights: Weights, key: str) -> object:
    """Return what the file's metadata says of `key`; a value of the wrong kind is an error."""
    value = weights.metadata.get(key)
    if value is None:
        return None
    if key == "token_dropout":
        if not isinstance(value, bool):
            raise WeightsError(f"{weights.path}: metadata has token_dropout = {str(value)[:80]!r}")
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WeightsError(f"{weights.path}: metadata has {key} = {str(value)[:80]!r}")
    return value


def _from_shapes(weights: Weights) -> dict[str, int]:
    """Return the properties that tensor names and shapes show."""
    embedding = weights.tensors.get("embed_tokens.weight")
    if embedding is None:
        raise WeightsError(f"{weights.path}: no tensor embed_tokens.weight: not an ESM-2 model")
    if len(embedding.shape) != 2 or 0 in embedding.shape:
        raise WeightsError(f"{weights.path}: embed_tokens.weight has shape {embedding.shape}")
    hidden_dim = embedding.shape[1]
    numbered = (re.match(r"layers\.(\d{1,9})\.", name) for name in weights.tensors)
    layers = {int(match[1]) for match in numbered if match}
    if not layers:
        raise WeightsError(f"{weights.path}: no tensors layers.N.*: not an ESM-2 model")
    if max(layers) >= _FAR_MORE_LAYERS_THAN_ANY_ESM2:
        raise WeightsError(f"{weights.path}: a tensor names layer {max(layers)}")
    found = {"num_layers": max(layers) + 1, "hidden_dim": hidden_dim}
    rotary = weights.tensors.get("layers.0.self_attn.rot_emb.inv_freq")
    if rotary is not None:
        if len(rotary.shape) != 1 or 0 in rotary.shape or hidden_dim % (2 * rotary.shape[0]):
            raise WeightsError(
                f"{weights.path}: rot_emb.inv_freq has shape {rotary.shape}, which fits no heads "
                f"of hidden_dim {hidden_dim}"
            )
        found["attention_heads"] = hidden_dim // (2 * rotary.shape[0])
    return found


def _check_heads(hidden_dim: int, attention_heads: object) -> None:
    assert isinstance(attention_heads, int)
    if attention_heads < 1 or hidden_dim % (2 * attention_heads):
        raise WeightsError(
            f"hidden_dim {hidden_dim} does not divide into {attention_heads} heads of even width"
        )


def _check_trunk(weights: Weights, num_layers: int, hidden_dim: int) -> None:
    expected = trunk_shapes(num_layers, hidden_dim)
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{weights.path}: tensor {missing[0]}{more} missing")
    for name, shape in expected.items():
        if weights.tensors[name].shape != shape:
            raise WeightsError(
                f"{weights.path}: tensor {name} has shape {weights.tensors[name].shape}, "
                f"an ESM-2 of hidden_dim {hidden_dim} has {shape}"
            )


def _dtype(weights: Weights, num_layers: int, hidden_dim: int) -> str:
    dtypes = {weights.tensors[name].dtype for name in trunk_shapes(num_layers, hidden_dim)}
    if len(dtypes) > 1:
        raise WeightsError(f"{weights.path}: tensors of several types: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop()
    if dtype not in ("float32", "float16", "bfloat16"):
        raise WeightsError(f"{weights.path}: tensors of type {dtype}")
    return dtype


def _repr_layers(
    asked: list[int] | None, num_layers: int, released: ReleasedModel | None
) -> Property:
    if asked is not None:
        return Property(select_layers(asked, num_layers), "override")
    if released is not None:
        return Property(released.repr_layers, "catalog")
    return Property((num_layers,), "last layer")


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
