"""Detection: which model was chosen, from metadata alone, and where each property comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lib.catalog import RELEASED
from lib.errors import WeightsError
from lib.models.adapted import lay_over
from lib.models.adapter import (
    Adapter,
    base_settings,
    is_adapter,
    read_adapter,
    refuse_contact_head,
)
from lib.models.formats import find_weights, open_weights
from lib.models.layers import choose_layers
from lib.models.naming import model_name
from lib.models.properties import CATALOG_ALONE, Property, catalog_shape, find_shape
from lib.models.regression import Regression, read_regression, regression_path
from lib.models.released import Proof, prove, refuse_false_name, take_md5
from lib.models.trunk import check_trunk, trunk_dtype
from lib.models.weights import Weights
from schema.esm2_config import ESM2Config, ModelShape
from schema.settings import ModelSettings

__all__ = ["Detection", "detect"]


@dataclass(frozen=True)
class Detection:
    """What is known of a model before any of its tensors is read.

    `weights` is None for a released name that is not on disk; the shape is then the catalog's.
    `repr_layers` are the layers to keep, in the order asked for, all in 0 … num_layers. `sources`
    says of every property where its value comes from, in the order in which they are shown.
    `released` is the released name by which the settings call these weights or their base; `proof`
    tells whether they are what the name says. `base_name` is the name of the model that an adapter
    changes. `regression` is set if contacts are to be predicted and the contact regression is on
    disk.
    """

    name: str
    weights: Weights | None
    shape: ModelShape
    repr_layers: tuple[int, ...]
    sources: Mapping[str, str]
    released: str | None = None
    regression: Regression | None = None
    base_name: str | None = None

    @property
    def properties(self) -> dict[str, Property]:
        """Every detected value with its source."""
        # All that can be told; `sources` has the properties that apply to this model.
        values = {
            **asdict(self.shape),
            "repr_layers": self.repr_layers,
            "parameters": self.shape.parameters,
        }
        if self.weights is not None:
            values |= {
                "weights_format": self.weights.format,
                "dtype": trunk_dtype(self.weights, self.shape),
                "base": str(self.weights.unadapted.path),
                "unknown_keys": self.weights.unknown_keys,
                "left_out": self.weights.left_out,
                "contact_regression": self._regression_place(self.weights),
            }
        return {key: Property(values[key], source) for key, source in self.sources.items()}

    @property
    def untrained(self) -> bool:
        """Whether the weights say that they were made by scripts/make_model.py."""
        return self.weights is not None and self.weights.untrained

    def require_weights(self) -> Weights:
        """Return the weights; raises WeightsError if they are not on disk."""
        if self.weights is None:
            raise WeightsError(f"{self.name}: weights are not on disk")
        return self.weights

    def with_layers(self, layers: tuple[int, ...], source: str) -> Detection:
        """Return this detection with other layers to keep."""
        return replace(self, repr_layers=layers, sources={**self.sources, "repr_layers": source})

    def find_regression(self) -> Regression:
        """Read the contact regression of weights on disk; raises WeightsError if there is none."""
        return read_regression(
            self.require_weights(), self.shape.num_layers, self.shape.attention_heads
        )

    def proof(self, sha256: str | None = None, md5: str | None = None) -> Proof | None:
        """Tell whether the weights are a released model; None as long as that is not known.

        sha256, md5: digests of the weights, as far as they were taken; without them, the sizes of
        the files may tell that the weights are not released. Raises WeightsError.
        """
        if self.weights is None:
            return None
        with _disk_errors(self.weights):
            return prove(self.weights, self.shape, sha256, md5)

    def take_proof(self) -> Proof | None:
        """Tell whether the weights are a released model, by digests if nothing else can tell.

        Returns None if the weights are not on disk. Raises WeightsError.
        """
        if self.weights is None:
            return None
        with _disk_errors(self.weights):
            md5 = self.take_md5()
            found = self.proof(md5=md5)
            return found if found is not None else self.proof(self.weights.sha256(), md5)

    def take_md5(self) -> str | None:
        """Return the MD5 of weights that no SHA-256 can prove to be released; raises OSError."""
        return take_md5(self.require_weights(), self.shape)

    def config(self, sha256: str, md5: str | None = None) -> ESM2Config:
        """Return the ESM2Config of weights on disk with these digests.

        A released model has its released name, whatever its file is called. md5: what `take_md5`
        returns. Raises OSError if the digest of an adapter's base is not known yet and cannot be
        taken.
        """
        weights = self.require_weights()
        proof = self.proof(sha256, md5)
        # A regression among the weights has no digest of its own: theirs covers it.
        regression_sha256 = self.regression.sha256 or sha256 if self.regression else None
        return ESM2Config(
            name=(proof and proof.model) or self.name,
            **asdict(self.shape),
            repr_layers=self.repr_layers,
            parameters=self.shape.parameters,
            weights_format=weights.format,
            dtype=trunk_dtype(weights, self.shape),
            sha256=sha256,
            untrained=self.untrained,
            contact_regression_sha256=regression_sha256,
            released=None if proof is None else proof.released,
            base_name=self.base_name,
            base_sha256=weights.unadapted.sha256() if self.base_name is not None else None,
        )

    def _regression_place(self, weights: Weights) -> str:
        if self.regression is not None:
            return str(self.regression.path)
        return f"{regression_path(weights.unadapted.path)} (not on disk)"


def detect(model: ModelSettings, *, contacts: bool = False, any_base: bool = False) -> Detection:
    """Detect the chosen model: metadata and tensor shapes, checked against catalog and config.

    contacts: whether they are to be predicted. Weights without a contact regression are then
    refused, except under a released name, whose regression can be downloaded. any_base: the base of
    an adapter may have another name than the adapter says, as the caller compares its digest.

    Raises WeightsError if the weights are not a complete ESM-2 model or a property is missing,
    SettingsError if config.ini contradicts them or asks for a layer that they do not have.
    """
    path = find_weights(model)
    if path is not None and is_adapter(path):
        adapter = read_adapter(path)
        if contacts:
            refuse_contact_head(adapter)
        detection = _detect_adapted(model, adapter, any_base=any_base)
    else:
        detection = _from_catalog(model) if path is None else _from_weights(model, path)
    return _with_regression(detection) if contacts else detection


def _detect_adapted(model: ModelSettings, adapter: Adapter, *, any_base: bool) -> Detection:
    """Detect the base of a LoRA adapter, and lay the adapter over it."""
    of_base, source = base_settings(model, adapter, any_base=any_base)
    path = find_weights(of_base)
    if path is not None and is_adapter(path):
        raise WeightsError(f"{adapter.folder}: its base {path} is an adapter itself")
    base = _from_catalog(of_base) if path is None else _from_weights(of_base, path)
    name = model_name(adapter.folder.resolve())
    adapted = replace(base, name=name, base_name=base.name)
    if base.weights is None:
        return adapted
    weights = lay_over(base.weights, adapter)
    return replace(adapted, weights=weights, sources={**base.sources, "base": source})


def _from_catalog(model: ModelSettings) -> Detection:
    """Return what the catalog says of a released name that is not on disk."""
    released, shape = RELEASED[model.esm_model], catalog_shape(model)
    sources = dict.fromkeys(asdict(shape), CATALOG_ALONE)
    layers, sources["repr_layers"] = choose_layers(model.repr_layers, shape.num_layers, released)
    sources["parameters"] = CATALOG_ALONE
    return Detection(model.esm_model, None, shape, layers, sources, model.esm_model)


def _from_weights(model: ModelSettings, path: Path) -> Detection:
    """Detect the whole model at `path`: a released one, if the settings name it so."""
    weights = open_weights(path)
    released = RELEASED.get(model.esm_model)
    shape, sources = find_shape(weights, model, released)
    check_trunk(weights, shape)
    refuse_false_name(weights, shape)
    layers, sources["repr_layers"] = choose_layers(model.repr_layers, shape.num_layers, released)
    trunk_dtype(weights, shape)  # refuses a mixture of types, and types that ESM-2 does not have
    sources |= {"parameters": "tensor shapes", "weights_format": "file", "dtype": "tensors"}
    if weights.unknown_keys:
        sources["unknown_keys"] = "config.json"
    if weights.left_out:
        sources["left_out"] = "beside the trunk"
    if released is None:
        return Detection(model_name(path), weights, shape, layers, sources)
    return Detection(model.esm_model, weights, shape, layers, sources, model.esm_model)


@contextmanager
def _disk_errors(weights: Weights) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"{weights.path}: {error.strerror or error}") from None


def _with_regression(detection: Detection) -> Detection:
    """Read the contact regression, or show where that of a released model will lie.

    Nothing is added while the weights are not on disk.
    """
    if detection.weights is None:
        return detection
    beside = detection.weights.regression_file
    if detection.released is not None and beside is not None and not beside.exists():
        return replace(detection, sources={**detection.sources, "contact_regression": "catalog"})
    return replace(
        detection,
        regression=detection.find_regression(),
        sources={**detection.sources, "contact_regression": "file"},
    )
