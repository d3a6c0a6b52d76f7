"""Streams: if these fail, a run dies of its log, or a result that is lost counts as printed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script

FULL_DISK = Path("/dev/full")
LABEL = "é, 🧬"


@contextmanager
def dead_reader() -> Iterator[int]:
    """Give the end of a pipe whose reader has died, as tee does at Ctrl-C."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def close_stream(name: str, number: int) -> None:
    """Close a stream, as `>&-` does in a shell."""
    os.close(number)
    setattr(sys, name, None)


def print_ascii() -> None:
    """Let stdout be that of a locale that has ASCII alone."""
    sys.stdout = os.fdopen(1, "w", encoding="ascii", closefd=False)


def interrupt_imports() -> None:
    """Press Ctrl-C before `main` begins, where nobody reads stderr any more."""
    from scripts import _start

    os.close(2)
    _start._interrupted(signal.SIGINT, None)


@pytest.fixture
def flags(place: Place, small_model: Path) -> list[str | Path]:
    flags: list[str | Path] = ["--config", place.config, "--esm-model", small_model]
    return [*flags, "--input", SOME_PROTEINS, "--set", "compute.threads=1", "--label", LABEL]


def test_a_run_needs_no_reader_of_what_it_tells(script: Script, flags: list[str | Path]) -> None:
    """Before, a run ended at the next line of progress: failed, [Errno 28] or [Errno 32]."""
    closed = partial(close_stream, "stderr", 2)
    with dead_reader() as pipe:
        answers = [
            processes.run("embed", *flags, err=FULL_DISK),
            processes.run("embed", *flags, err=pipe),
            processes.run("embed", *flags, prepare=closed),
            processes.run("embed", *flags, prepare=partial(close_stream, "stdout", 1)),
        ]
    told = [answer.out.split(":")[0] for answer in answers]
    assert told == [*(f"run {n} finished" for n in (1, 2, 3)), ""]
    assert [answer.status for answer in answers] == [0, 0, 0, 0]
    history = script("history", "--json").json
    assert [run["status"] for run in history] == ["finished"] * 4


def test_ctrl_c_that_ends_the_reader_of_the_log_too(
    script: Script, place: Place, flags: list[str | Path]
) -> None:
    """Before, `2>&1 | tee log` made a failure of it: status 4 and [Errno 32] on the record."""
    gate = place.folder / "gate"
    pause = partial(processes.pause, gate)
    pausing = partial(processes.at_call, "lib.network.pipeline.launch", 2, pause)
    flags += ["--set", "compute.tokens_per_pack=300"]
    with processes.start("embed", *flags, prepare=pausing) as process:
        process.wait_for("reached")
        assert process.err is not None
        process.err.close()
        process.err = None
        process.send_signal(signal.SIGINT)
        gate.touch()
        assert process.end().status == 130
    (attempt,) = script("history", "--run", "1", "--json").json["attempts"]
    assert attempt["outcome"] == "interrupted"


def test_ctrl_c_that_ends_the_reader_during_the_imports() -> None:
    assert processes.run_function(interrupt_imports).status == 130


def test_a_result_that_is_lost_is_told_by_the_status(
    script: Script, place: Place, flags: list[str | Path]
) -> None:
    """Before, it was 120, with a message of Python's; without a reader it stays without a word."""
    assert script("embed", *flags).status == 0
    with dead_reader() as pipe:
        full = processes.run("history", "--config", place.config, out=FULL_DISK)
        unread = processes.run("history", "--config", place.config, out=pipe)
    closed = partial(close_stream, "stdout", 1)
    unwanted = processes.run("history", "--config", place.config, prepare=closed)
    assert (full.status, full.err) == (4, "error: No space left on device\n")
    assert (unread.status, unread.err) == (4, "")
    assert (unwanted.status, unwanted.err) == (0, "")


def test_what_a_locale_lacks_is_printed_as_an_escape(
    script: Script, place: Place, flags: list[str | Path]
) -> None:
    """Before, the database was said to have malformed rows."""
    assert script("embed", *flags).status == 0
    history = partial(processes.run, "history", "--config", place.config, prepare=print_ascii)
    assert "  \\u00e9, \\ud83e\\uddec  " in history().out
    assert [run["label"] for run in history("--json").json] == [LABEL]
