"""Made-up catalogs: untrained files stand where the published ones do, with their own digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lib.catalog import RELEASED, HubFiles, PublishedFile, ReleasedModel
from schema.esm2_config import ModelShape

SMALL = ModelShape(2, 64, 4, True)  # of small_model and other_model in tests/conftest.py


def published(path: Path, algorithm: str = "sha256") -> PublishedFile:
    """Describe an untrained file as if it had been published under its name."""
    content = path.read_bytes()
    size = len(content) if algorithm == "sha256" else None
    return PublishedFile(path.name, size, hashlib.new(algorithm, content).hexdigest(), algorithm)


def release(
    file: Path,
    folder: Path | None = None,
    *,
    shape: ModelShape = SMALL,
    regression: Path | None = None,
    algorithm: str = "sha256",
) -> ReleasedModel:
    """Return an entry of the catalog with untrained files: a .pt, and a Hugging Face folder."""
    hub = None
    if folder is not None:
        weights = tuple(published(path) for path in sorted(folder.glob("*.safetensors")))
        hub = HubFiles("facebook/untrained", "0" * 40, weights)
    beside = None if regression is None else published(regression)
    return ReleasedModel(shape, (shape.num_layers,), published(file, algorithm), beside, hub)


def put(name: str, entry: ReleasedModel) -> None:
    """Put an entry into the catalog of this process: for scripts that run in a fork."""
    RELEASED[name] = entry
