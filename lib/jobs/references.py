"""References: the library that a run is compared with, chosen by the format of the weights.

A .pt file is loaded by fair-esm, a Hugging Face folder by transformers, an adapter by PEFT on its
base: none of them by the reader that the run used, so that a mistake of that reader shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from lib.errors import LedgerError, MachineError
from lib.jobs.fair_esm import FairEsm, Reference, load_by_fair_esm, load_by_reader
from lib.jobs.transformers_model import Transformers, adapt, from_fair_esm, load_by_transformers
from lib.models.adapted import AdaptedWeights
from lib.models.detection import Detection
from lib.models.weights import Weights
from lib.network.memory import available_bytes, ran_out
from lib.units import size
from schema.esm2_config import ModelShape

__all__ = ["ChosenReference", "choose_reference"]

_ADAPTED = "base_model.model."
_OF_TRANSFORMERS = ("esm.", "encoder.", "embeddings.")  # how its names of tensors begin


@dataclass(frozen=True)
class ChosenReference:
    """A reference and what it is: libraries and versions.

    `own_reader` says why the tensors were read by this program after all; None: they were not.
    """

    model: Reference
    libraries: str
    own_reader: str | None = None

    def describe(self) -> str:
        """Return libraries and versions, and who read the weights if it was not they."""
        if self.own_reader is None:
            return self.libraries
        return f"{self.libraries} with tensors read by esm-ledger ({self.own_reader})"


class _NotTakenError(Exception):
    """A library cannot load these weights; the text says why."""


def choose_reference(detection: Detection) -> ChosenReference:
    """Load detected weights with the library of their format, in float32 on the CPU.

    Where it is not installed or does not take them, fair-esm's module gets the tensors that this
    program reads. Raises MachineError if the model does not fit into memory, WeightsError if the
    weights changed meanwhile.
    """
    weights = detection.require_weights()
    with _memory_errors(weights.path, detection.shape):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what these libraries will drop, and of heads
                chosen = _load(weights, detection)
        except _NotTakenError as reason:
            model = FairEsm(load_by_reader(weights, detection))
            chosen = ChosenReference(model, model.library, str(reason))
    weights.refuse_if_changed()
    return chosen


def _load(weights: Weights, detection: Detection) -> ChosenReference:
    """Load weights by their own library; raises _NotTakenError if it cannot be done."""
    whole = weights.unadapted
    if not whole.metadata:
        raise _NotTakenError(f"{whole.path} has no configuration")
    for key, value in asdict(detection.shape).items():
        said = whole.metadata.get(key)
        if said != value:
            raise _NotTakenError(f"{key} is {value}, {said} in the metadata of {whole.path}")
    try:
        if isinstance(weights, AdaptedWeights):
            return _load_adapted(weights, detection)
        if weights.format == "huggingface":
            of_transformers = Transformers(load_by_transformers(weights.path))
            return ChosenReference(of_transformers, of_transformers.library)
        of_fair_esm = FairEsm(load_by_fair_esm(weights, detection))
        return ChosenReference(of_fair_esm, of_fair_esm.library)
    except ModuleNotFoundError as error:
        raise _NotTakenError(f"{error.name} is not installed") from None
    except (LedgerError, MemoryError, _NotTakenError):
        raise
    except Exception as error:  # a library raises anything for weights that it does not take
        if isinstance(error, RuntimeError) and ran_out(error):
            raise
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _NotTakenError(f"not loaded by its own library: {told}") from None


def _load_adapted(weights: AdaptedWeights, detection: Detection) -> ChosenReference:
    base, folder = weights.base, weights.adapter.folder
    modules = [name.removeprefix(_ADAPTED) for name in weights.adapter.tensors]
    named_by_transformers = any(name.startswith(_OF_TRANSFORMERS) for name in modules)
    kind = "EsmForMaskedLM" if any(name.startswith("esm.") for name in modules) else "EsmModel"
    model: Reference
    if base.format == "huggingface":
        if not named_by_transformers:
            raise _NotTakenError("the adapter is of fair-esm's module, its base of transformers'")
        model = Transformers(adapt(load_by_transformers(base.path, kind), folder))
        libraries = model.library
    else:
        module = load_by_fair_esm(base, detection)
        if named_by_transformers:
            model = Transformers(adapt(from_fair_esm(module, detection.shape, kind), folder))
            libraries = f"{model.library}, the base loaded by {FairEsm.library}"
        else:
            model = FairEsm(adapt(module, folder))
            libraries = model.library
    return ChosenReference(model, f"PEFT {version('peft')} on {libraries}")


@contextmanager
def _memory_errors(path: Path, shape: ModelShape) -> Iterator[None]:
    """Refuse a model that does not fit into memory, before it is loaded or when that is noticed."""
    needed = 4 * shape.parameters
    available = available_bytes(torch.device("cpu"), needed)
    if available is not None and needed > available:
        raise MachineError(
            f"{path}: {shape.parameters} parameters in float32 need "
            f"{size(needed)} of memory, {size(available)} are available"
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise MachineError(f"{path}: out of memory for {shape.parameters} parameters") from None
