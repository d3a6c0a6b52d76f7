"""Arrow arrays: if this fails, records change on their way to a file, or every run loads pandas."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib import arrow
from lib.arrow import arrow_array, numbers
from schema.parquet import DESCRIBING
from tests.conftest import ROOT

PROGRAM = """
import sys, numpy as np, pyarrow as pa
from lib.arrow import arrow_array, numbers
numbers(arrow_array(np.arange(3), pa.int64()))
arrow_array(["a"], pa.string())
print("pandas" in sys.modules)
"""
IMPORTS_PANDAS = re.compile(r"pa\.array\(|pa\.table\((?!\[)|\.to_numpy\(|\.empty_table\(")
VALUES: dict[pa.DataType, list[Any]] = {
    pa.int64(): [3, -1, 2**62],
    pa.int32(): [3, -1, 2**31 - 1],
    pa.float32(): [0.5, -1.25, float("inf")],
    pa.float16(): [0.5, -1.25, 65504.0],
    pa.string(): ["", "Ångström β", "\U0001f9ec", "a\tb"],
    pa.binary(): [b"", b"MKV", None, b"\x00\xff"],
    pa.binary(3): [b"abc", b"\x00\x01\x02"],
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_an_array_is_that_of_pyarrow(kind: pa.DataType) -> None:
    for values in (VALUES[kind], VALUES[kind][:1], []):
        made, expected = arrow_array(values, kind), pa.array(values, kind)
        made.validate(full=True)
        assert made.equals(expected)
        assert made.null_count == expected.null_count
    if "int" in str(kind) or "float" in str(kind):
        array = np.array(VALUES[kind], kind.to_pandas_dtype())
        assert arrow_array(array, kind).equals(pa.array(array))
        assert arrow_array(array[::-2], kind).equals(pa.array(array[::-2].copy()))
        assert arrow_array(array, kind).buffers()[1].address == array.ctypes.data


def test_numbers_are_those_of_all_chunks() -> None:
    whole = pa.array(range(10), pa.int32())
    for column in (
        whole,
        whole[3:7],
        whole[:0],
        pa.chunked_array([whole[2:5]]),
        pa.chunked_array([whole[:3], whole[3:3], whole[5:]]),
        pa.chunked_array([], pa.int32()),
    ):
        assert numbers(column).tolist() == column.to_pylist()
        assert numbers(column).dtype == np.int32


def test_what_no_array_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pa.ArrowInvalid, match="not 32 bytes each"):
        arrow_array([b"a" * 32, b"a"], DESCRIBING.field("embedded_sha256").type)
    monkeypatch.setattr(arrow, "_MOST_BYTES", 5)
    with pytest.raises(pa.ArrowInvalid, match="6 bytes in one array, 5 at most"):
        arrow_array(["abc", "äb"[:1] + "b"], pa.string())


def test_pandas_is_not_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


def test_arrays_are_made_in_no_other_way() -> None:
    for path in Path(ROOT / "lib").rglob("*.py"):
        # The first tells of them, the second needs pandas itself.
        if path.name not in ("arrow.py", "hdf5.py"):
            assert not IMPORTS_PANDAS.search(path.read_text(encoding="utf-8")), path
