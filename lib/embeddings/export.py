"""Exports: a run written in the formats that other programs read, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lib.embeddings.dataset import write_dataset
from lib.embeddings.hdf5 import write_anndata, write_hdf5
from lib.embeddings.provenance import FACTS_FILE, facts_of, facts_text
from lib.embeddings.reading import RunEmbeddings
from lib.embeddings.selection import Selection, kept_columns
from lib.embeddings.tables import write_csv
from lib.errors import SettingsError
from lib.files import new_path
from schema.parquet import VectorColumn

__all__ = ["FORMATS", "export", "exported_columns"]

Writer = Callable[[RunEmbeddings, Path, Selection], None]


def export(run: RunEmbeddings, form: str, to: Path, selection: Selection) -> None:
    """Write `run` to `to` in one of FORMATS; an existing file is never replaced.

    Raises SettingsError if the format cannot hold the selection or the run did not keep it.
    """
    if selection.kind == "per_tok" and form not in ("hdf5", "dataset"):
        raise SettingsError(f"format {form}: no per-residue vectors, hdf5 and dataset have them")
    if selection.dtype is not None and form != "hdf5":
        raise SettingsError(f"format {form}: float32 only, hdf5 has others")
    if form == "esm-extract" and selection != Selection():
        raise SettingsError("format esm-extract: holds everything that was kept")
    FORMATS[form](run, to, selection)


def exported_columns(run: RunEmbeddings, form: str, selection: Selection) -> list[VectorColumn]:
    """Return the columns that `export` writes; raises SettingsError if they were not kept."""
    if form == "esm-extract":
        return kept_columns(run)
    return [run.column(selection.kind, selection.layer)]


def _write_npy(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write a folder: embeddings.npy (N, hidden_dim) float32, ids.txt in its order, run.json."""
    column = run.column(selection.kind, selection.layer)
    with new_path(to, folder=True) as folder:
        run.write_matrix(column, folder / "embeddings.npy")
        ids = "".join(f"{name}\n" for name in run.ids)
        (folder / "ids.txt").write_text(ids, encoding="utf-8", newline="\n")
        (folder / FACTS_FILE).write_text(facts_text(facts_of(run, [column])), encoding="utf-8")


def _write_esm_extract(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    # Imported here, because the other formats need no torch.
    from lib.embeddings.torch_files import write_esm_extract

    write_esm_extract(run, to, selection)


def _write_virnucpro(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    from lib.embeddings.torch_files import write_virnucpro

    write_virnucpro(run, to, selection)


FORMATS: dict[str, Writer] = {
    "hdf5": write_hdf5,
    "esm-extract": _write_esm_extract,
    "npy": _write_npy,
    "virnucpro": _write_virnucpro,
    "anndata": write_anndata,
    "csv": write_csv,
    "dataset": write_dataset,
}
