"""Download of released weights and contact regressions from fair-esm's published address."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lib.errors import MachineError
from lib.models.detection import Detection, detect
from lib.models.formats import hub_checkpoints
from lib.models.regression import read_regression_file, regression_path
from lib.models.transfer import Progress, ask_length, transfer
from schema.settings import ModelSettings

__all__ = ["Offer", "ask_size", "download_regression", "download_target", "download_weights"]


@dataclass(frozen=True)
class Offer:
    """A file that a server offers: `size` in bytes, or None and the reason in `why_not`."""

    url: str
    target: Path
    size: int | None
    why_not: str


def download_target(model: ModelSettings) -> Path:
    """Return where a download of the chosen released name is put."""
    folder = Path(model.weights_directory) if model.weights_directory else hub_checkpoints()
    return folder / f"{model.esm_model}.pt"


def ask_size(model: ModelSettings) -> Offer:
    """Ask how large a download of the chosen released name is, and wait at most ten seconds."""
    url, target = _url(model), download_target(model)
    try:
        return Offer(url, target, ask_length(url), "no Content-Length")
    except MachineError as error:
        return Offer(url, target, None, str(error).removeprefix(f"{url}: "))


def download_weights(model: ModelSettings, progress: Progress) -> Path:
    """Fetch the chosen released name; `progress` is told the bytes so far and in all.

    The file gets its name only when it is whole and detected as the model of that name; a broken
    download is continued by the next one (lib/models/transfer.py). Raises MachineError if network
    or disk fail, WeightsError if the file is not that model.
    """
    target = download_target(model)

    def verify(part: Path) -> None:
        detect(replace(model, weights_directory=str(part.parent)))

    transfer(_url(model), target, verify, progress)
    return target


def download_regression(model: ModelSettings, detection: Detection, progress: Progress) -> Path:
    """Fetch the contact regression of a released model that is on disk, to beside its file.

    fair-esm publishes it in the folder `regression`, beside the folder of the models. Works and
    raises as `download_weights` does.
    """
    target = regression_path(detection.require_weights().unadapted.path)
    models = model.download_url.rstrip("/")
    url = f"{models.rpartition('/')[0]}/regression/{target.name}"
    layers, heads = detection.shape.num_layers, detection.shape.attention_heads

    def verify(part: Path) -> None:
        read_regression_file(part, layers, heads)

    transfer(url, target, verify, progress)
    return target


def _url(model: ModelSettings) -> str:
    return f"{model.download_url.rstrip('/')}/{model.esm_model}.pt"
