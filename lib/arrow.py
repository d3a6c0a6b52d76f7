"""Arrow arrays made of numpy's and of lists, and numpy's of Arrow's, without pandas.

`pyarrow.array`, `to_numpy`, `empty_table` and `pyarrow.table` of a dict import pandas if it is
installed, whatever the values are: 35 MB of memory and a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Values", "arrow_array", "numbers", "retyped"]

Values = Sequence[Any] | npt.NDArray[Any]

_MOST_BYTES = np.iinfo(np.int32).max


def arrow_array(values: Values, kind: pa.DataType) -> pa.Array:
    """Return values as an Arrow array, without a copy if they are an array of numpy's of that kind.

    values: (N,) numbers, texts or bytes; None among bytes of any length is a null. Raises
    pa.ArrowInvalid for 2 GB of texts or bytes, and for bytes of another width than the kind's.
    """
    if pa.types.is_string(kind):
        return _bytes([text.encode() for text in values]).view(kind)
    if pa.types.is_binary(kind):
        return _bytes(values)
    if pa.types.is_fixed_size_binary(kind):
        return _fixed_bytes(values, kind)
    numbers = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def numbers(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """Return (N,) the numbers of a column without nulls; of one chunk, without a copy."""
    kind = np.dtype(column.type.to_pandas_dtype())
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts])


def retyped(schema: pa.Schema, before: pa.DataType, after: pa.DataType) -> list[pa.Field]:
    """Return the fields of a schema, those of one type with another instead."""
    return [field.with_type(after) if field.type == before else field for field in schema]


def _bytes(values: Values) -> pa.Array:
    ends = np.cumsum([0, *(len(one or b"") for one in values)])
    if ends[-1] > _MOST_BYTES:
        raise pa.ArrowInvalid(f"{ends[-1]} bytes in one array, {_MOST_BYTES} at most")
    nulls = None
    if None in values:
        there = np.array([one is not None for one in values])
        nulls = pa.py_buffer(np.packbits(there, bitorder="little"))
    joined = b"".join([one or b"" for one in values])
    buffers = [nulls, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(joined)]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def _fixed_bytes(values: Values, kind: pa.FixedSizeBinaryType) -> pa.Array:
    if {*map(len, values)} - {kind.byte_width}:
        raise pa.ArrowInvalid(f"not {kind.byte_width} bytes each")
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(b"".join(values))])
