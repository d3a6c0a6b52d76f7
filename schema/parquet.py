"""The columns of a checkpoint file, and the key under which its footer carries the ledger's."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

__all__ = ["FOOTER_KEY", "checkpoint_columns"]

FOOTER_KEY = b"esm_ledger"


def checkpoint_columns(
    include: Sequence[str], repr_layers: Sequence[int], hidden_dim: int, per_tok_dtype: str
) -> pa.Schema:
    """Return the Arrow schema of a checkpoint.

    One row per record; `mean_L` and `bos_L` are (hidden_dim,) float32, `per_tok_L` is a
    row-major (embedded_length x hidden_dim) list of `per_tok_dtype`.
    """
    columns = [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("embedded_length", pa.int32(), nullable=False),
    ]
    value = pa.float16() if per_tok_dtype == "float16" else pa.float32()
    for kind in include:
        for layer in repr_layers:
            shape = pa.list_(value) if kind == "per_tok" else pa.list_(pa.float32(), hidden_dim)
            columns.append(pa.field(f"{kind}_{layer}", shape, nullable=False))
    return pa.schema(columns)
