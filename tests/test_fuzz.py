"""Fuzzing: if these fail, a stranger's file ends in a traceback, or the fuzzer would not see it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.ledger.footer import read_footer
from schema.parquet import FOOTER_KEY
from tests.torture import fuzz

# Mutated files are read or refused in tests/test_reliability.py, by the command of the page.


def crash(_: Path) -> None:
    raise KeyError("nobody caught me")


def die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def swallow_memory(_: Path) -> None:
    bytearray(2 << 30)


def hang(_: Path) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("read", "fault"),
    [(crash, "KeyError"), (die, "signal SIGKILL"), (swallow_memory, "MemoryError"), (hang, "hang")],
)
def test_the_fuzzer_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], None], fault: str
) -> None:
    if read is hang:
        monkeypatch.setattr(fuzz, "_HANG_SECONDS", 0.2)
    target = fuzz._Target("x", ".x", lambda path, _: path.touch(), read)
    outcome = fuzz._fuzz(target, tmp_path, 1, 0)
    assert fault in outcome.lost
    assert list(tmp_path.glob("lost-0-x.x"))


# ---- What fuzzing found


@pytest.mark.parametrize("written", [b"", b"{", b"\xdd", b"[" * 100_000, b"nul"])
def test_a_footer_that_is_no_json_is_told_as_such(tmp_path: Path, written: bytes) -> None:
    table = pa.table({"record": [0]}).replace_schema_metadata({FOOTER_KEY: written})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"\Afooter metadata is not JSON\Z") as caught:
        read_footer(tmp_path / "a.parquet")
    assert type(caught.value) is ValueError
