"""Kill: if this fails, a run that was killed at the wrong moment loses or repeats records."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.torture import strace


def torture(*flags: str) -> list[tuple[str, int, str, str]]:
    """Run parts of the torture; return its table, after checking that nothing was lost."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()[1:-1]]
    return [(what, int(trials), happened, lost) for what, trials, happened, lost in rows]


def test_killed_anywhere_a_run_ends_with_the_same_bits() -> None:
    table = torture("--only", "kill", "--minutes", "0.3", "--seed", "3")
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
    table = torture("--only", "calls", "--minutes", "0.2", "--seed", "1")
    assert [row[0].removeprefix("SIGKILL before a system call of ") for row in table] == [
        "embed.py",
        "resume.py",
        "recomputing",
    ]
    assert all(trials > 0 and lost == "nothing" for _, trials, _, lost in table)
    # With this seed the first kill is one.
    assert "within a transaction" in table[0][2]


def test_the_torture_refuses_a_part_that_is_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--only", "none"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--only none: not one of" in done.stderr
