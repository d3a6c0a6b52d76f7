"""Columns in memory: the vectors of a few sequences, on their way to a checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schema.parquet import CONTACTS, VectorColumn

__all__ = ["Column", "Vectors", "vector_bytes"]

Column = npt.NDArray[Any] | list[npt.NDArray[Any]]


def vector_bytes(
    column: VectorColumn, residues: npt.NDArray[np.int64], hidden_dim: int, per_tok_dtype: str
) -> int:
    """Return the bytes that a column has in files, uncompressed.

    residues: (records,) embedded of each. per_tok_dtype: float32 or float16; all else is float32.
    """
    if column.is_pooled:
        return 4 * hidden_dim * len(residues)
    if column.kind == CONTACTS:
        return 4 * int(residues @ residues)
    return (2 if per_tok_dtype == "float16" else 4) * hidden_dim * int(residues.sum())


@dataclass(frozen=True)
class Vectors:
    """The vectors kept of a few sequences, in the order of the plan.

    A pooled column is a (sequences, hidden_dim) float32 array. `per_tok` is a list with one
    (residues, hidden_dim) array per sequence, `contacts` one with (residues, residues).
    """

    columns: Mapping[VectorColumn, Column]

    def joined(self, later: Vectors) -> Vectors:
        """Return these vectors and, after them, those of `later`, which has the same columns."""
        columns: dict[VectorColumn, Column] = {}
        for name, first in self.columns.items():
            second = later.columns[name]
            if isinstance(first, list):
                columns[name] = [*first, *second]
            else:
                columns[name] = np.concatenate([first, second])
        return Vectors(columns)
