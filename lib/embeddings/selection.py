"""Selection: which vectors of a run are exported, in the order of the FASTA."""

from __future__ import annotations

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
from schema.parquet import VectorColumn, vector_columns

__all__ = ["Selection", "kept_columns", "library", "ordered_vectors", "refuse_repeats"]


@dataclass(frozen=True)
class Selection:
    """Which vectors: `kind` is mean, bos or per_tok; None means the last layer, the stored type."""

    kind: str = "mean"
    layer: int | None = None
    dtype: str | None = None


def kept_columns(run: RunEmbeddings) -> list[VectorColumn]:
    """Return every column of vectors that a run kept."""
    return vector_columns(run.facts["include"], run.layers)


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
