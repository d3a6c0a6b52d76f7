"""The columns of a checkpoint file, and the key under which its footer carries the ledger's."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

__all__ = ["CONTACTS", "FOOTER_KEY", "checkpoint_columns", "vector_columns"]

FOOTER_KEY = b"esm_ledger"
CONTACTS = "contacts"  # of a model, not of a layer


def vector_columns(include: Sequence[str], repr_layers: Sequence[int]) -> list[str]:
    """Return the columns that hold vectors: one per kind and layer, and one for contacts."""
    columns = []
    for kind in include:
        columns += [kind] if kind == CONTACTS else [f"{kind}_{layer}" for layer in repr_layers]
    return columns


def checkpoint_columns(
    include: Sequence[str], repr_layers: Sequence[int], hidden_dim: int, per_tok_dtype: str
) -> pa.Schema:
    """Return the Arrow schema of a checkpoint.

    One row per record; `mean_L` and `bos_L` are (hidden_dim,) float32, `per_tok_L` is a
    row-major (embedded_length x hidden_dim) list of `per_tok_dtype`, `contacts` a row-major
    (embedded_length x embedded_length) list of float32.
    """
    columns = [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("embedded_length", pa.int32(), nullable=False),
    ]
    value = pa.float16() if per_tok_dtype == "float16" else pa.float32()
    shapes = {"per_tok": pa.list_(value), CONTACTS: pa.list_(pa.float32())}
    for name in vector_columns(include, repr_layers):
        kind = name if name == CONTACTS else name.rpartition("_")[0]
        shape = shapes.get(kind, pa.list_(pa.float32(), hidden_dim))
        columns.append(pa.field(name, shape, nullable=False))
    return pa.schema(columns)
