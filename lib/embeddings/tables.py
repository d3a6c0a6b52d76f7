"""Tables of text: a run as CSV, for spreadsheets, R and whatever reads nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from lib.arrow import arrow_array
from lib.embeddings.provenance import described_path, facts_of
from lib.embeddings.reading import RunEmbeddings
from lib.embeddings.selection import Selection, ordered_vectors

__all__ = ["write_csv"]

_VALUES_AT_ONCE = 1 << 20
_DESCRIBING = ("id", "length", "embedded_length")


def write_csv(run: RunEmbeddings, to: Path, selection: Selection) -> None:
    """Write a row per record, and the run's facts as `to`.json.

    Columns: record, id, length, embedded_length, and a column per value, as `mean_36_0`. Numbers
    are written with as many digits as it takes to read the same float32 back.
    """
    column = run.column(selection.kind, selection.layer)
    names = [f"{column}_{i}" for i in range(run.hidden_dim)]
    described = run.table(*_DESCRIBING)
    described = described.add_column(0, "record", arrow_array(run.records, pa.int64()))
    step = max(1, _VALUES_AT_ONCE // run.hidden_dim)
    with (
        described_path(to, facts_of(run, [column])) as temporary,
        ordered_vectors(run, column, to) as vectors,
        csv.CSVWriter(temporary, _columns(described, names)) as writer,
    ):
        for first in range(0, len(run), step):
            part = described.slice(first, step)
            for name, values in zip(names, np.array(vectors[first : first + step]).T, strict=True):
                part = part.append_column(name, arrow_array(values, pa.float32()))
            writer.write_table(part)


def _columns(described: pa.Table, names: list[str]) -> pa.Schema:
    return pa.schema([*described.schema, *(pa.field(name, pa.float32()) for name in names)])
