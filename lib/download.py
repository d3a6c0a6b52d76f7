"""Download of released weights from fair-esm's published address."""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from lib.detection import detect
from lib.errors import LedgerError, MachineError, WeightsError
from lib.weights import hub_checkpoints
from schema.settings import ModelSettings

__all__ = ["download_target", "download_weights"]

_CHUNK = 1 << 20


def download_target(model: ModelSettings) -> Path:
    """Return where a download of the chosen released name is put."""
    folder = Path(model.weights_directory) if model.weights_directory else hub_checkpoints()
    return folder / f"{model.esm_model}.pt"


def download_weights(model: ModelSettings, progress: Callable[[int, int | None], None]) -> Path:
    """Fetch the chosen released name; `progress` is told bytes so far and in all.

    The file takes its name only when it is whole and detected as the model of that name.
    Raises MachineError if the network or disk fails, WeightsError if it is not the model;
    either leaves no file behind.
    """
    target = download_target(model)
    url = f"{model.download_url.rstrip('/')}/{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
            part = Path(folder) / target.name
            _fetch(url, part, progress)
            try:
                detect(replace(model, weights_directory=folder))
            except WeightsError as error:
                fact = str(error).replace(str(part), target.name)
                raise WeightsError(f"{url}: {fact}") from None
            part.rename(target)
    except LedgerError:
        raise
    except urllib.error.HTTPError as error:
        raise MachineError(f"{url}: HTTP status {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise MachineError(f"{url}: {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise MachineError(f"{url}: {error}") from None
    return target


def _fetch(url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as file:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        received = 0
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            progress(received, total)
        if total is not None and received != total:
            raise MachineError(f"{url}: broke off after {received} of {total} bytes")
        file.flush()
        os.fsync(file.fileno())
