"""Files for torch.load: a .pt per record as esm-extract writes it, and VirNucPro's single .pt.

esm-extract: scripts/extract.py of facebookresearch/esm. VirNucPro: extract_esm in units.py of
Li-Jing-1997/VirNucPro.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib.embeddings.provenance import FACTS_FILE, described_path, facts_of, facts_text
from lib.embeddings.reading import RunEmbeddings, lists, values
from lib.embeddings.selection import (
    Selection,
    kept_columns,
    ordered_vectors,
    refuse_repeats,
)
from lib.errors import LedgerError, MachineError
from lib.files import new_path
from schema.parquet import CONTACTS, VectorColumn

__all__ = ["write_esm_extract", "write_virnucpro"]

# Kind to the key that esm-extract uses for it, in the order in which it writes them.
_KEYS = {
    "per_tok": "representations",
    "mean": "mean_representations",
    "bos": "bos_representations",
    CONTACTS: CONTACTS,
}
_LONGEST_NAME = 255  # bytes, on every file system in use


def write_esm_extract(run: RunEmbeddings, to: Path, _selection: Selection) -> None:
    """Write a folder with a .pt per record: its label, {layer: float32 tensor} for each kind, and
    one tensor for contacts.

    The label is the id, a blank and the description, and names the file, with `/` as `_`. That of
    esm-extract is the header, which differs if a tab or several blanks follow the id. Raises
    LedgerError for labels that would share a file name or are too long for one.
    """
    described = run.table("id", "description")
    names = [_file_name(label) for label in _labels(described)]
    for record, name in zip(run.records.tolist(), names, strict=True):
        if len(name.encode()) > _LONGEST_NAME:
            raise LedgerError(
                f"record {record}: file name of {len(name.encode())} bytes exceeds {_LONGEST_NAME}"
            )
    refuse_repeats(run, names, "file name")
    kept = kept_columns(run)
    columns = sorted(kept, key=lambda column: [*_KEYS].index(column.kind))
    with new_path(to, folder=True) as folder:
        facts = facts_text(facts_of(run, kept))
        (folder / FACTS_FILE).write_text(facts, encoding="utf-8")
        for positions, table in run.stored("id", "description", *columns):
            labels = _labels(table)
            vectors = {one: _rows(run, one, table.column(str(one))) for one in columns}
            for row, position in enumerate(positions.tolist()):
                result: dict[str, Any] = {"label": labels[row]}
                for column, rows in vectors.items():
                    tensor = torch.from_numpy(rows[row].astype(np.float32))
                    if column.layer is None:
                        result[_KEYS[column.kind]] = tensor
                    else:
                        result.setdefault(_KEYS[column.kind], {})[column.layer] = tensor
                _save(result, folder / names[position], to)


def write_virnucpro(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write {'proteins': ids, 'data': (hidden_dim,) tensors}, and the run's facts as `to`.json."""
    column = run.column(selection.kind, selection.layer)
    with (
        described_path(to, facts_of(run, [column])) as temporary,
        ordered_vectors(run, column, to) as vectors,
    ):
        data = [torch.from_numpy(vector) for vector in vectors]
        _save({"proteins": run.ids, "data": data}, temporary, to)


def _labels(table: Any) -> list[str]:  # noqa: ANN401 (a pyarrow table)
    described = zip(
        table.column("id").to_pylist(), table.column("description").to_pylist(), strict=True
    )
    return [f"{name} {rest}".rstrip() for name, rest in described]


def _file_name(label: str) -> str:
    return label.replace("/", "_").replace("\0", "_") + ".pt"


def _rows(run: RunEmbeddings, column: VectorColumn, stored: Any) -> list[npt.NDArray[Any]]:  # noqa: ANN401
    if column.is_pooled:
        return list(values(stored).reshape(-1, run.hidden_dim))
    if column.kind == CONTACTS:
        return [row.reshape(math.isqrt(row.size), -1) for row in lists(stored)]
    return [row.reshape(-1, run.hidden_dim) for row in lists(stored)]


def _save(content: dict[str, Any], path: Path, to: Path) -> None:
    with _torch_errors(to):
        torch.save(content, path)


@contextmanager
def _torch_errors(to: Path) -> Iterator[None]:
    """Turn the errors of torch's zip writer on a failing disk into a MachineError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise MachineError(f"{to}: {str(error).splitlines()[0][:200]}") from None
