"""Loading: a detected model made ready to compute, and tried on one short sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.alphabet import tokenise
from lib.detection import Detection, detect
from lib.device import choose_device, device_name, use_threads
from lib.download import download_weights
from lib.errors import MachineError, WeightsError
from lib.network import Network, load_network
from lib.runs import AttemptFacts
from lib.settings import Settings
from schema.esm2_config import ESM2Config

__all__ = ["LoadedModel", "load_model", "try_model", "with_weights"]

_SHORT_SEQUENCE = b"MKTAYIAKQRQISFVKSHFSRQ"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its full identity and what an attempt records."""

    config: ESM2Config
    network: Network
    facts: AttemptFacts
    device_reason: str


def with_weights(
    settings: Settings,
    detection: Detection,
    show: Callable[[str], Callable[[int, int | None], None]],
) -> Detection:
    """Return a detection with weights on disk, downloading a released name if it must.

    `show` is given the name and returns what is told of bytes received and in all.
    """
    if detection.weights is not None:
        return detection
    download_weights(settings.model, show(detection.name))
    return detect(settings.model)


def load_model(settings: Settings, detection: Detection, sha256: str) -> LoadedModel:
    """Load the detected weights, whose digest has been taken, on the device of the settings.

    Raises MachineError for a missing device or memory.
    """
    weights = detection.weights
    assert weights is not None
    device, reason = choose_device(settings.compute)
    threads = use_threads(settings.compute)
    config = detection.config(sha256)
    try:
        network = load_network(weights, config, device)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise MachineError(
            f"{weights.path}: out of memory for {4 * config.parameters} bytes on {device}"
        ) from None
    except OSError as error:
        raise MachineError(f"{weights.path}: {error.strerror or error}") from None
    facts = AttemptFacts(
        weights_path=weights.path,
        device=str(device),
        device_name=device_name(device),
        threads=threads,
        tokens_per_pack=settings.compute.tokens_per_pack,
    )
    return LoadedModel(config, network, facts, reason)


def try_model(model: LoadedModel) -> None:
    """Run one short sequence through every layer; raises WeightsError if it is not finite."""
    tokens = torch.from_numpy(tokenise([_SHORT_SEQUENCE]))
    layers = range(model.config.num_layers + 1)
    with torch.inference_mode():
        for layer, hidden in model.network.forward(tokens, [len(_SHORT_SEQUENCE)], layers):
            if not torch.isfinite(hidden).all():
                raise WeightsError(
                    f"{model.facts.weights_path}: layer {layer} gives non-finite values"
                )
