"""Queries: another input, to be embedded by the very model and the rules of an earlier run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lib.jobs.admission import settings_of, weights_in_hand
from lib.models.detection import Detection
from lib.settings import Overrides, Settings
from schema.parquet import VectorColumn
from schema.tables import Run

__all__ = ["query_model", "query_settings"]


def query_settings(
    run: Run, current: Settings, query: str, column: VectorColumn, weights: Path | None
) -> Settings:
    """Return the settings by which `query`, a FASTA file, gets vectors comparable with a run's.

    All that changes vectors is the run's; on which device, and with how much of it, is said by
    `current`. Only `column` is kept, and this process alone computes. weights: where the run's
    weights lie now, if they have moved.
    """
    said: Overrides = {"input.fasta": [query]}
    if weights is not None:
        said = {**said, "model.esm_model": str(weights)}
    settings = settings_of(run, said)
    return replace(
        settings,
        model=replace(settings.model, repr_layers=None),
        compute=replace(current.compute, precision=run.precision, compile=settings.compute.compile),
        output=replace(current.output, include=[column.kind]),
        database=current.database,
    )


def query_model(run: Run, settings: Settings, column: VectorColumn) -> tuple[Detection, str]:
    """Return the weights of a run, to keep `column`, and their digest; no tensor is read.

    Raises IdentityRefusedError if they are not the run's, WeightsError if there are none.
    """
    detection, sha256 = weights_in_hand(run, settings)
    assert column.layer is not None
    return detection.with_layers((column.layer,), f"run {run.id}"), sha256
