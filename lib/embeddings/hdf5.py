"""HDF5 files: UniProt's layout, and AnnData. h5py and anndata are imported when they are used.

UniProt's layout: https://www.uniprot.org/help/embeddings, one dataset per protein at the root;
`original_id` on each is bio_embeddings' addition, which many readers look for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.embeddings.provenance import facts_of, facts_text
from lib.embeddings.reading import RunEmbeddings
from lib.embeddings.selection import (
    Selection,
    library,
    ordered_vectors,
    refuse_repeats,
)
from lib.errors import LedgerError
from lib.files import new_path

__all__ = ["write_anndata", "write_hdf5"]


def write_hdf5(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write a dataset per record, named by its id with `/` as `_`, created in FASTA order.

    kind per_tok gives (embedded_length, hidden_dim), mean and bos give (hidden_dim,).
    Raises LedgerError for repeated ids and for values outside the range of float16.
    """
    h5py = library("h5py", "hdf5")
    column = run.column(selection.kind, selection.layer)
    # A slash would make groups, and UniProt's readers expect datasets at the root.
    keys = [name.replace("/", "_") for name in run.ids]
    refuse_repeats(run, keys, "HDF5 name")
    if "." in keys:
        raise LedgerError(f"record {run.records[keys.index('.')]}: HDF5 has no name '.'")
    facts = facts_of(run, [column])
    with (
        new_path(to, folder=False) as temporary,
        ordered_vectors(run, column, to) as vectors,
        _hdf5_file(h5py, temporary) as (file, sink),
    ):
        # HDF5 1.x refuses a ninth attribute on a group that tracks order, so the rest is JSON.
        for name in ("model", "model_sha256", "untrained", "layer", "pooling"):
            file.attrs[name] = facts[name]
        file.attrs["esm_ledger"] = facts_text(facts)
        for record, key, original, vector in zip(
            run.records.tolist(), keys, run.ids, vectors, strict=True
        ):
            data = _converted(vector, selection.dtype, record)
            file.create_dataset(key, data=data).attrs["original_id"] = original
            sink.check()


def write_anndata(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write an .h5ad: X is (N, hidden_dim), obs the records, uns["esm_ledger"] the run's facts."""
    anndata, h5py = library("anndata", "anndata"), library("h5py", "anndata")
    pandas = library("pandas", "anndata")
    column = run.column(selection.kind, selection.layer)
    described = run.table("id", "description", "length", "embedded_length")
    obs = pandas.DataFrame(
        {name: described.column(name).to_numpy() for name in described.schema.names}
    )
    obs.insert(0, "record", run.records)
    if len(run.inputs) > 1:
        obs["input_file"] = pandas.Categorical(run.input_files)
    refuse_repeats(run, run.ids, "obs name")
    obs = obs.set_index("id")
    with (
        new_path(to, folder=False) as temporary,
        ordered_vectors(run, column, to) as vectors,
        _hdf5_file(h5py, temporary) as (file, _sink),
    ):
        made = anndata.AnnData(X=vectors, obs=obs, uns={"esm_ledger": facts_of(run, [column])})
        anndata.io.write_elem(file, "/", made)
        if made.raw is None and "raw" in file:
            del file["raw"]  # a null, which anndata before 0.12 cannot read


def _converted(vector: npt.NDArray[Any], dtype: str | None, record: int) -> npt.NDArray[Any]:
    if dtype is None or vector.dtype == dtype:
        return vector
    with np.errstate(over="ignore"):
        converted = vector.astype(dtype)
    if not np.isfinite(converted).all():
        raise LedgerError(f"record {record}: a value of {np.abs(vector).max():g} exceeds {dtype}")
    return converted


class _Sink(io.FileIO):
    """A file that accepts every write and remembers the first error of the disk.

    HDF5 writes its caches when its objects are freed, where Python can only print an error. So it
    is told that every write succeeded, and `check` raises the error afterwards.
    """

    failure: OSError | None = None

    def write(self, content: Any) -> int:  # noqa: ANN401 (whatever has a buffer)
        """Write all of `content`; returns its bytes, written or not."""
        left = memoryview(content).cast("B")
        size = len(left)
        while left and self.failure is None:
            try:
                left = left[super().write(left) or 0 :]
            except OSError as error:
                self.failure = error
        return size

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self.failure is not None:
            raise self.failure


@contextmanager
def _hdf5_file(h5py: ModuleType, path: Path) -> Iterator[tuple[Any, _Sink]]:
    """Yield a new HDF5 file at `path`, and its sink; raises OSError if the disk fails."""
    with _Sink(path, "w+") as sink:
        try:
            with h5py.File(sink, "w", track_order=True) as file:
                yield file, sink
        finally:
            # Whatever HDF5 reports when it closes, the error of the disk is the cause.
            sink.check()
