"""Selection: which vectors of a run are exported, and the facts written beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.embeddings.reading import RunEmbeddings
from lib.errors import LedgerError, SettingsError
from lib.files import disk_errors
from schema.parquet import VectorColumn

__all__ = ["Selection", "facts_of", "facts_text", "library", "ordered_vectors", "refuse_repeats"]


@dataclass(frozen=True)
class Selection:
    """Which vectors: `kind` is mean, bos or per_tok; None means the last layer, the stored type."""

    kind: str = "mean"
    layer: int | None = None
    dtype: str | None = None


def facts_of(run: RunEmbeddings, column: VectorColumn | None = None) -> dict[str, Any]:
    """Return what identifies a run and its model; with `column` also its layer and pooling.

    `input` is the first of several files, `inputs` then has a list for each of their properties.
    """
    facts = {
        "model": run.model["name"],
        "model_sha256": run.model["sha256"],
        "untrained": bool(run.model["untrained"]),
        "precision": run.facts["precision"],
        "run": run.facts["id"],
        "run_uuid": run.facts["uuid"],
        "status": run.facts["status"],
        "input": run.facts["input_path"],
        "input_sha256": run.facts["input_sha256"],
        "records": len(run),
        "records_total": run.facts["records_total"],
    }
    if len(run.inputs) > 1:
        keys = ("path", "sha256", "first_record", "records")
        facts["inputs"] = {key: [one[key] for one in run.inputs] for key in keys}
    if column is not None:
        pooling = column.kind if column.is_pooled else "none"
        facts |= {"layer": column.layer, "pooling": pooling}
    return facts


def facts_text(facts: dict[str, Any]) -> str:
    """Return facts as the text of a JSON file."""
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def ordered_vectors(
    run: RunEmbeddings, column: VectorColumn, beside: Path
) -> Iterator[Sequence[npt.NDArray[Any]]]:
    """Yield the vectors of every record in FASTA order: (hidden_dim,), or (residues, hidden_dim).

    They are sorted into a temporary file in the folder of `beside`, which is as large as the
    column, and memory-mapped from there.
    """
    with (
        disk_errors(beside),
        tempfile.TemporaryDirectory(dir=beside.parent, prefix=f".{beside.name}.") as folder,
    ):
        path = Path(folder) / "ordered"
        if column.kind == "per_tok":
            starts, dtype = run.write_residues(column, path)
            # Copy-on-write, because torch warns of read-only arrays.
            flat = np.memmap(path, dtype, "c") if len(run) else np.empty(0, dtype)
            bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
            yield [flat[first:stop].reshape(-1, run.hidden_dim) for first, stop in bounds]
        else:
            run.write_matrix(column, path)
            # A plain array, because anndata cannot write numpy.memmap.
            yield np.load(path, mmap_mode="c" if len(run) else None).view(np.ndarray)


def library(name: str, form: str) -> ModuleType:
    """Import the library of a format; raises SettingsError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise SettingsError(f"format {form}: {error.name or name} is not installed") from None


def refuse_repeats(run: RunEmbeddings, names: Sequence[str], what: str) -> None:
    """Refuse two records with the same name; `what` describes the name, as in `HDF5 name`."""
    first: dict[str, int] = {}
    for record, name in zip(run.records.tolist(), names, strict=True):
        if name in first:
            raise LedgerError(f"record {record}: {what} {name!r} is record {first[name]}'s")
        first[name] = record
