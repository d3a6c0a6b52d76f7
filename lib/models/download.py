"""Download of released weights: from fair-esm's published address, or the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lib.catalog import RELEASED
from lib.errors import MachineError
from lib.models.detection import Detection, detect
from lib.models.formats import hub_checkpoints
from lib.models.hub import fetch_model, hub_cache, hub_files, hub_url
from lib.models.regression import read_regression_file, regression_path
from lib.models.released import refuse_unpublished
from lib.models.transfer import Progress, ask_length, transfer
from schema.settings import ModelSettings

__all__ = ["Offer", "ask_size", "download_regression", "download_target", "download_weights"]


@dataclass(frozen=True)
class Offer:
    """What a server offers under `name`: `size` in bytes, or None and the reason in `why_not`."""

    name: str
    url: str
    target: Path
    size: int | None
    why_not: str


def download_target(model: ModelSettings) -> Path:
    """Return where the .pt of the chosen released name is put."""
    folder = Path(model.weights_directory) if model.weights_directory else hub_checkpoints()
    return folder / f"{model.esm_model}.pt"


def ask_size(model: ModelSettings) -> Offer:
    """Tell how large a download of the chosen released name is; ask for ten seconds at most."""
    if model.source == "huggingface":
        files = hub_files(model.esm_model)
        total = sum(file.bytes or 0 for file in files.weights)
        return Offer(files.repository, hub_url(files), hub_cache(), total, "")
    url, target = _url(model), download_target(model)
    try:
        return Offer(target.name, url, target, ask_length(url), "no Content-Length")
    except MachineError as error:
        return Offer(target.name, url, target, None, str(error).removeprefix(f"{url}: "))


def download_weights(model: ModelSettings, progress: Progress) -> Path:
    """Fetch the chosen released name from its source, and return where it lies.

    `progress` is told the bytes so far and in all.

    The file gets its name only when it is whole and the published one. A model of the same shape
    that is another is kept under another name. A broken download is continued by the next one
    (lib/models/transfer.py). Raises MachineError if network or disk fail, WeightsError if the file
    is not that model.
    """
    if model.source == "huggingface":
        return fetch_model(model.esm_model, progress)
    target = download_target(model)
    published = RELEASED[model.esm_model].file

    def verify(part: Path) -> None:
        detect(replace(model, source="fair-esm", weights_directory=str(part.parent)))
        refuse_unpublished(part, published, target)

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
    published = RELEASED[detection.released].regression if detection.released else None
    layers, heads = detection.shape.num_layers, detection.shape.attention_heads

    def verify(part: Path) -> None:
        read_regression_file(part, layers, heads)
        if published is not None:
            refuse_unpublished(part, published, target)

    transfer(url, target, verify, progress)
    return target


def _url(model: ModelSettings) -> str:
    return f"{model.download_url.rstrip('/')}/{model.esm_model}.pt"
