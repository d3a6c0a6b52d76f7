"""Kill: if this fails, a run that was killed at the wrong moment loses or repeats records."""

from __future__ import annotations

import re
import sys
from importlib import import_module

import pytest

from tests.processes import run_function
from tests.torture import strace


def main() -> None:
    """Run the torture as `python -m tests.torture` does."""
    sys.exit(import_module("tests.torture.__main__").main())


def torture(*flags: str) -> list[tuple[str, int, str, str]]:
    """Run parts of the torture; return its table, after checking that nothing was lost."""
    done = run_function(main, *flags)
    assert done.status == 0, done.out + done.err
    rows = [re.split(r"  +", line.strip()) for line in done.out.splitlines()[1:-1]]
    return [(what, int(trials), happened, lost) for what, trials, happened, lost in rows]


def test_killed_anywhere_a_run_ends_with_the_same_bits() -> None:
    table = torture("--only", "kill", "--rounds", "1", "--seed", "3")
    assert [row[0].removeprefix("SIGKILL in ") for row in table] == [
        "embed.py, at each step in turn",
        "resume.py",
        "a second resume.py",
        "resume.py --recompute-damaged",
        "embed.py, at a random time",
        "SIGXFSZ in embed.py, at a random byte of a file",
    ]
    for _, trials, happened, lost in table:
        assert trials > 0
        assert happened.endswith("resumed: the same bits")
        assert lost == "nothing"


@pytest.mark.skipif(not strace.is_there(), reason="strace is not there, or may not trace")
def test_killed_within_a_commit_or_a_file_a_run_ends_with_the_same_bits() -> None:
    table = torture("--only", "calls", "--rounds", "1", "--seed", "1")
    assert [row[0].removeprefix("SIGKILL before a system call of ") for row in table] == [
        "embed.py",
        "resume.py",
        "recomputing",
    ]
    assert all(trials > 0 and lost == "nothing" for _, trials, _, lost in table)
    # With this seed the first kill is one.
    assert "within a transaction" in table[0][2]


def test_a_run_that_reuses_is_killed_and_its_sources_damaged() -> None:
    table = torture("--only", "reuse", "--rounds", "1", "--seed", "6")
    assert [row[0] for row in table] == [
        "SIGKILL in an embed.py that reuses, at each step in turn",
        "SIGKILL in resume.py of a run that reuses",
        "SIGKILL in a second resume.py of a run that reuses",
        "SIGKILL in an embed.py that reuses, at a random time",
        "a source damaged before reuse is planned",
        "a source damaged after, and SIGKILL in resume.py",
    ]
    for _, trials, happened, lost in table:
        assert trials == 1
        assert happened.endswith(("resumed: the same bits", "computed instead"))
        assert lost == "nothing"


def test_the_torture_refuses_a_part_that_is_none() -> None:
    done = run_function(main, "--only", "none")
    assert done.status == 2
    assert "--only none: not one of" in done.err
