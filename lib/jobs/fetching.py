"""Fetching: released weights and contact regressions that are not on disk yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from lib.models.detection import Detection, detect
from lib.models.download import Offer, ask_size, download_regression, download_weights
from lib.settings import Settings
from schema.settings import ModelSettings

__all__ = ["offer_of", "with_weights"]

Show = Callable[[str], AbstractContextManager[Callable[[int, int | None], None]]]


def offer_of(settings: Settings, detection: Detection) -> Offer | None:
    """Return what `with_weights` would download; None if the weights are on disk."""
    missing = _missing_release(settings, detection)
    return None if missing is None else ask_size(missing)


def with_weights(settings: Settings, detection: Detection, show: Show) -> Detection:
    """Return a detection with weights on disk, after downloading a released name if necessary.

    If contacts are to be predicted, the contact regression of a released model is downloaded too.
    show: takes the name of a download, and gives for its duration a function that is told the
    bytes received so far and in all.
    """
    contacts = "contacts" in settings.output.include
    missing = _missing_release(settings, detection)
    if missing is not None:
        with show(missing.esm_model) as progress:
            download_weights(missing, progress)
        detection = detect(settings.model, contacts=contacts)
    regression = detection.require_weights().regression_file
    if not contacts or detection.released is None or regression is None or regression.exists():
        return detection
    with show(regression.stem) as progress:
        download_regression(settings.model, detection, progress)
    return detect(settings.model, contacts=True)


def _missing_release(settings: Settings, detection: Detection) -> ModelSettings | None:
    """Return the settings of the released model to download; None if its weights are on disk."""
    if detection.weights is not None or detection.released is None:
        return None
    return replace(settings.model, esm_model=detection.released)
