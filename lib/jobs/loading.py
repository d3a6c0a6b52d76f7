"""Loading: a detected model made ready to compute, and tried on one short sequence."""

from __future__ import annotations

from _thread import start_new_thread
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from lib.errors import MachineError, WeightsError
from lib.files import disk_errors
from lib.ledger.attempts import AttemptFacts
from lib.models.detection import Detection
from lib.network.device import (
    choose_device,
    choose_pack,
    choose_precision,
    device_name,
    use_threads,
)
from lib.network.elementwise import compiled
from lib.network.esm2 import Network, load_network
from lib.network.fused import BY_TORCH, FusedAttention, fused_attention
from lib.network.linear import refuse_rounding
from lib.network.memory import device_errors, ran_out
from lib.sequences.alphabet import tokenise
from lib.settings import Settings
from schema.esm2_config import ESM2Config

__all__ = [
    "KnownModel",
    "LoadableModel",
    "LoadedModel",
    "begin_config",
    "beside",
    "know_model",
    "load_model",
    "try_model",
]

Result = TypeVar("Result")

_SHORT_SEQUENCE = b"MKTAYIAKQRQISFVKSHFSRQ"
# What torch compiles fits the size that it saw first best; a pack is longer than one sequence.
_AS_A_PACK = 40 * _SHORT_SEQUENCE


@dataclass(frozen=True)
class KnownModel:
    """A model that is ready to compute, here or elsewhere: its identity and its circumstances.

    `facts` are what an attempt records; `settings` have the precision and the tokens per pack that
    were chosen if none were set; `reasons` say why this device, this precision and these tokens
    were chosen.
    """

    config: ESM2Config
    facts: AttemptFacts
    settings: Settings
    reasons: tuple[str, str, str]


@dataclass(frozen=True)
class LoadedModel(KnownModel):
    """A model in the memory of this process."""

    network: Network


@dataclass(frozen=True)
class LoadableModel(KnownModel):
    """A model whose digest is taken and whose tensors are not read; `load` reads them."""

    device: torch.device
    load: Callable[[], Network]


def load_model(settings: Settings, detection: Detection, sha256: str | None = None) -> LoadedModel:
    """Load the detected weights on the device of the settings.

    sha256: the digest of the weights. If no identity had to be checked before and it is not known,
    it is computed during loading. Raises MachineError if the device is missing or memory runs out,
    WeightsError if contacts are to be kept and the contact regression is not on disk.
    """
    place = _choose(settings, detection)
    config, network = _read(detection, place, sha256)
    return LoadedModel(config, place.facts, place.settings, place.reasons, network)


def know_model(settings: Settings, detection: Detection, sha256: str | None) -> LoadableModel:
    """Take the digest of the detected weights, unless `sha256` is known, and read no tensor.

    The model may be loaded later, from the very bytes that have the digest. Raises what
    `load_model` raises, as its `load` does.
    """
    place = _choose(settings, detection)
    with disk_errors(detection.require_weights().path):
        config = begin_config(detection, sha256)()

    def load() -> Network:
        return _read(detection, place, config.sha256)[1]

    return LoadableModel(config, place.facts, place.settings, place.reasons, place.device, load)


def begin_config(detection: Detection, sha256: str | None) -> Callable[[], ESM2Config]:
    """Begin to take the digests of weights, unless `sha256` is known; return what waits for them.

    That raises OSError, and WeightsError if the weights have changed meanwhile.
    """
    weights = detection.require_weights()
    digest = beside(weights.sha256) if sha256 is None else None
    md5 = beside(detection.take_md5) if sha256 is None else None

    def finish() -> ESM2Config:
        config = detection.config(
            digest.result() if digest else str(sha256), md5.result() if md5 else None
        )
        weights.refuse_if_changed()
        return config

    return finish


def try_model(model: LoadedModel) -> None:
    """Run one short sequence through every layer; raises WeightsError if it is not finite."""
    layers = range(model.config.num_layers + 1)
    with device_errors(model.network.device):
        for layer, finite in _finite_layers(model.network, _SHORT_SEQUENCE, layers):
            if not finite:
                fact = f"layer {layer} gives non-finite values"
                raise WeightsError(f"{model.facts.weights_path}: {fact}")


def _finite_layers(
    network: Network, sequence: bytes, layers: Sequence[int]
) -> Iterator[tuple[int, bool]]:
    """Run a sequence through the network; yield each of `layers` and whether it is finite."""
    tokens = torch.from_numpy(tokenise([sequence]))
    with torch.inference_mode():
        for layer, hidden in network.forward(tokens, [len(sequence)], layers):
            yield layer, bool(torch.isfinite(hidden).all())


@dataclass(frozen=True)
class _Place:
    """Where and how this process computes, as KnownModel has it."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    fused: FusedAttention | None
    facts: AttemptFacts
    settings: Settings
    reasons: tuple[str, str, str]


def _choose(settings: Settings, detection: Detection) -> _Place:
    """Choose device, precision, packs and threads; raises MachineError and WeightsError."""
    weights = detection.require_weights()
    device, device_reason = choose_device(settings.compute)
    precision, precision_reason = choose_precision(settings.compute, device)
    tokens, pack_reason = choose_pack(settings.compute, device)
    chosen = replace(settings.compute, precision=precision, tokens_per_pack=tokens)
    threads = use_threads(chosen)
    if "contacts" in settings.output.include and detection.regression is None:
        absent = f"{weights.path}: no contact regression on disk"
        raise WeightsError(f"{absent} (with include contacts, make download and embed download it)")
    dtype = getattr(torch, precision)
    fused = fused_attention(device, dtype) if settings.compute.fused_attention else None
    facts = AttemptFacts(
        weights_path=weights.path,
        device=str(device),
        device_name=device_name(device),
        threads=threads,
        tokens_per_pack=tokens,
        attention=str(fused or BY_TORCH),
    )
    reasons = device_reason, precision_reason, pack_reason
    return _Place(device, dtype, fused, facts, replace(settings, compute=chosen), reasons)


def _read(detection: Detection, place: _Place, sha256: str | None) -> tuple[ESM2Config, Network]:
    """Read detected weights into memory, and compile the network if the settings say so.

    Raises WeightsError if the weights change meanwhile, MachineError if float32 is rounded
    here or torch cannot compile.
    """
    device = place.device
    weights = detection.require_weights()
    try:
        with device_errors(device):
            refuse_rounding(device)
            config_known = begin_config(detection, sha256)
            network = load_network(detection, device, place.dtype)
            config = config_known()
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        needed = detection.shape.parameters
        raise MachineError(
            f"{weights.path}: out of memory for {needed} parameters on {device}"
        ) from None
    except OSError as error:
        raise MachineError(f"{weights.path}: {error.strerror or error}") from None
    network.fused = place.fused  # the settings may say no
    if place.settings.compute.compile:
        _compile(network)
    return config, network


def _compile(network: Network) -> None:
    """Let torch compile what a network computes between its products, by one sequence."""
    network.elementwise = compiled()
    try:
        list(_finite_layers(network, _AS_A_PACK, [network.shape.num_layers]))
    except (RuntimeError, OSError) as error:  # no compiler, no Triton, or no place for its cache
        why = " ".join(str(error).split()).partition(" Set TORCH")[0][:300]  # then comes advice
        raise MachineError(f"compute.compile: {type(error).__name__}: {why}") from None


def beside(work: Callable[[], Result]) -> Future[Result]:
    """Begin `work` in a thread that dies with the process: a signal need not wait for its end."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    # A signal that raises within Thread.start() makes the new thread print a traceback.
    start_new_thread(run, ())
    return future
