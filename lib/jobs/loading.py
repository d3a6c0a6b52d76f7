"""Loading: a detected model made ready to compute, and tried on one short sequence."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from threading import Thread

import torch

from lib.errors import MachineError, WeightsError
from lib.ledger.runs import AttemptFacts
from lib.models.detection import Detection, detect
from lib.models.download import Offer, ask_size, download_regression, download_weights
from lib.models.regression import regression_path
from lib.network.device import (
    choose_device,
    choose_pack,
    choose_precision,
    device_name,
    use_threads,
)
from lib.network.esm2 import Network, load_network
from lib.network.memory import ran_out
from lib.sequences.alphabet import tokenise
from lib.settings import Settings
from schema.esm2_config import ESM2Config

__all__ = ["LoadedModel", "load_model", "offer_of", "try_model", "with_weights"]

_SHORT_SEQUENCE = b"MKTAYIAKQRQISFVKSHFSRQ"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its full identity and what an attempt records.

    `settings` have the precision and the tokens per pack that were chosen where none were set;
    `reasons` tell why device, precision and tokens were.
    """

    config: ESM2Config
    network: Network
    facts: AttemptFacts
    settings: Settings
    reasons: tuple[str, str, str]


def offer_of(settings: Settings, detection: Detection) -> Offer | None:
    """Return what `with_weights` would download; None if the weights are on disk."""
    if detection.weights is not None:
        return None
    assert detection.released is not None
    return ask_size(replace(settings.model, esm_model=detection.released))


def with_weights(
    settings: Settings,
    detection: Detection,
    show: Callable[[str], AbstractContextManager[Callable[[int, int | None], None]]],
) -> Detection:
    """Return a detection with weights on disk, downloading a released name if it must.

    If contacts are to be predicted, so is its contact regression. `show` is given the name and
    gives, while it lasts, what is told of bytes received and in all.
    """
    contacts = "contacts" in settings.output.include
    if detection.weights is None:
        assert detection.released is not None
        with show(detection.released) as progress:
            download_weights(replace(settings.model, esm_model=detection.released), progress)
        detection = detect(settings.model, contacts=contacts)
    assert detection.weights is not None
    regression = regression_path(detection.weights.unadapted.path)
    if contacts and detection.released is not None and not regression.exists():
        with show(regression.stem) as progress:
            download_regression(settings.model, detection, progress)
        detection = detect(settings.model, contacts=True)
    return detection


def load_model(settings: Settings, detection: Detection, sha256: str | None = None) -> LoadedModel:
    """Load the detected weights on the device of the settings.

    sha256: their digest; where no identity had to be checked before, it is taken meanwhile.
    Raises MachineError for a missing device or memory, WeightsError if contacts are to be kept and
    the contact regression is not on disk.
    """
    weights = detection.weights
    assert weights is not None
    device, device_reason = choose_device(settings.compute)
    precision, precision_reason = choose_precision(settings.compute, device)
    tokens, pack_reason = choose_pack(settings.compute, device)
    chosen = replace(settings.compute, precision=precision, tokens_per_pack=tokens)
    settings = replace(settings, compute=chosen)
    threads = use_threads(settings.compute)
    if "contacts" in settings.output.include and detection.regression is None:
        raise WeightsError(f"{weights.path}: no contact regression on disk (embed downloads it)")
    try:
        digest = _beside(weights.sha256) if sha256 is None else None
        network = load_network(detection, device, getattr(torch, precision))
        config = detection.config(digest.result() if digest else str(sha256))
        weights.refuse_if_changed()
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        needed = detection.shape.parameters
        raise MachineError(
            f"{weights.path}: out of memory for {needed} parameters on {device}"
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
    return LoadedModel(
        config, network, facts, settings, (device_reason, precision_reason, pack_reason)
    )


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


def _beside(work: Callable[[], str]) -> Future[str]:
    """Begin `work` in a thread that a signal need not wait for: digests of large files are slow."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
