"""The contact regression of a model: the weights by which fair-esm turns attention into contacts.

fair-esm publishes it apart from the model, as `NAME-contact-regression.pt`, and looks for it beside
the model's file. Hugging Face folders hold it among their tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lib.errors import WeightsError
from lib.models.held_file import HeldFile
from lib.models.torch_archive import load_archive, refuse_inflated, tensor_info
from lib.models.weights import Weights

__all__ = ["Regression", "read_regression", "read_regression_file", "regression_path"]

_WEIGHT = "contact_head.regression.weight"
_BIAS = "contact_head.regression.bias"


@dataclass(frozen=True)
class Regression:
    """A logistic regression over the attention maps of every layer and head.

    weight: (layers, heads) float32. path: the file or folder that holds it. sha256: the digest of
    the regression's own file; None if it lies among the weights, whose digest covers it.
    """

    weight: torch.Tensor
    bias: float
    path: Path
    sha256: str | None


def regression_path(weights: Path) -> Path:
    """Return where fair-esm looks for the contact regression that belongs to a .pt file."""
    return weights.parent / f"{weights.stem}-contact-regression.pt"


def read_regression(weights: Weights, layers: int, heads: int) -> Regression:
    """Read the contact regression that belongs to weights; adapted weights have their base's.

    A file beside a .pt takes precedence over tensors in it, as in fair-esm. Raises WeightsError if
    there is none, or if it is not one number for each of `layers` x `heads` and a bias.
    """
    whole = weights.unadapted
    beside = whole.regression_file
    if beside is not None and beside.is_file():
        return read_regression_file(beside, layers, heads)
    if _WEIGHT not in whole.tensors or _BIAS not in whole.tensors:
        no_file = f"no {beside.name} beside it and " if beside is not None else ""
        raise WeightsError(f"{whole.path}: no contact regression: {no_file}no tensor {_WEIGHT}")
    tensors = dict(whole.read((_WEIGHT, _BIAS)))
    return _checked(tensors, whole.path, layers, heads, None)


def read_regression_file(path: Path, layers: int, heads: int) -> Regression:
    """Read a `NAME-contact-regression.pt` as fair-esm publishes it.

    Raises as `read_regression` does, and if the file changes meanwhile.
    """
    file = HeldFile(path)
    state = load_archive(file).get("model")
    tensors = state if isinstance(state, dict) else {}
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if name in (_WEIGHT, _BIAS) and isinstance(tensor, torch.Tensor)
    }
    for name in (_WEIGHT, _BIAS):
        if name not in found:
            raise WeightsError(f"{path}: no tensor {name}")
        tensor_info(name, found[name], path)
    refuse_inflated(found.values(), file)
    try:
        regression = _checked(found, path, layers, heads, file.sha256())
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    file.refuse_if_changed()
    return regression


def _checked(
    tensors: dict[str, torch.Tensor], path: Path, layers: int, heads: int, sha256: str | None
) -> Regression:
    for name, shape in ((_WEIGHT, (1, layers * heads)), (_BIAS, (1,))):
        found = tuple(tensors[name].shape)
        if found != shape:
            raise WeightsError(
                f"{path}: tensor {name} has shape {found}, {layers} layers of {heads} heads "
                f"have {shape}"
            )
        if not tensors[name].is_floating_point() or not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"{path}: tensor {name} contains non-finite values")
    weight = tensors[_WEIGHT].float().reshape(layers, heads).clone()
    return Regression(weight, float(tensors[_BIAS][0]), path, sha256)
