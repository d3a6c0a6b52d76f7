"""The columns of checkpoint files and of reuse plans, and the keys of the ledger's in footers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

__all__ = [
    "CONTACTS",
    "DESCRIBING",
    "EMBEDDED_SHA256",
    "EXPORT_KEY",
    "FOOTER_KEY",
    "REUSE_PLAN",
    "SEQUENCE_MD5",
    "VectorColumn",
    "checkpoint_columns",
    "vector_columns",
]

FOOTER_KEY = b"esm_ledger"
EXPORT_KEY = b"esm_ledger_export"
CONTACTS = "contacts"
EMBEDDED_SHA256 = "embedded_sha256"
SEQUENCE_MD5 = "sequence_md5"

# What a checkpoint file tells of each record, apart from its vectors. embedded_sha256: of the
# residues that went through the network; sequence_md5: of the whole sequence, upper case.
DESCRIBING = pa.schema(
    [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("embedded_length", pa.int32(), nullable=False),
        pa.field(EMBEDDED_SHA256, pa.binary(32), nullable=False),
        pa.field(SEQUENCE_MD5, pa.string(), nullable=False),
    ]
)

# A row per reused sequence, in the order of the plan: the first record that has the sequence, and
# the row to copy, counted within its source file.
REUSE_PLAN = pa.schema(
    [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class VectorColumn:
    """A column of vectors; `str` gives its name in a checkpoint file, as `mean_36`.

    kind: mean, bos, per_tok or contacts. layer: None for contacts, which belong to the model.
    """

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}_{self.layer}"

    @property
    def is_pooled(self) -> bool:
        """Whether a record has one vector: mean and bos."""
        return self.kind in ("mean", "bos")

    def arrow_type(self, hidden_dim: int, per_tok_dtype: str) -> pa.DataType:
        """Return the type of a row.

        (hidden_dim,) float32 if pooled; a row-major (embedded_length x hidden_dim) list of
        `per_tok_dtype` for per_tok, (embedded_length x embedded_length) of float32 for contacts.
        """
        if self.is_pooled:
            return pa.list_(pa.float32(), hidden_dim)
        half = self.kind == "per_tok" and per_tok_dtype == "float16"
        return pa.list_(pa.float16() if half else pa.float32())


def vector_columns(include: Sequence[str], repr_layers: Sequence[int]) -> list[VectorColumn]:
    """Return the columns that hold vectors: one per kind and layer, and one for contacts."""
    columns: list[VectorColumn] = []
    for kind in include:
        layers = [None] if kind == CONTACTS else repr_layers
        columns += [VectorColumn(kind, layer) for layer in layers]
    return columns


def checkpoint_columns(
    include: Sequence[str],
    repr_layers: Sequence[int],
    hidden_dim: int,
    per_tok_dtype: str,
    *,
    digests: bool,
) -> pa.Schema:
    """Return the Arrow schema of a checkpoint, which has one row per record.

    digests: whether it has the columns embedded_sha256 and sequence_md5, which version 1 had not.
    """
    vectors = [
        pa.field(str(column), column.arrow_type(hidden_dim, per_tok_dtype), nullable=False)
        for column in vector_columns(include, repr_layers)
    ]
    describing = [
        field
        for field in DESCRIBING
        if digests or field.name not in (EMBEDDED_SHA256, SEQUENCE_MD5)
    ]
    return pa.schema([*describing, *vectors])
