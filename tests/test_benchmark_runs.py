"""Benchmarks of whole runs: if this fails, a table of benchmarks/ was made by something else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, reuse
from tests.processes import run_program


def in_a_fork(command: Sequence[object], **_: object) -> subprocess.CompletedProcess[str]:
    """Run what `subprocess.run` would start with a Python of its own."""
    python, dash, program, *argv = map(str, command)
    assert (python, dash) == (sys.executable, "-c")
    done = run_program(program, *argv)
    return subprocess.CompletedProcess([], done.status, done.out, done.err)


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.figures.subprocess.run", in_a_fork)


def test_what_grows_is_measured_by_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "growth.json"
    assert growth.main(["--records", "20", "60", "--residues", "30", "--to", str(to)]) == 0
    few, many = json.loads(to.read_text())["inputs"]
    assert (few["records"], many["records"]) == (20, 60)
    for one in (few, many):
        assert one["whole_s"] > one["work_s"] > 0
        assert one["peak_bytes"] > 50e6
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("untrained, 1 layers, 16 wide; ")
    assert [line.split()[0] for line in printed[2:]] == ["20", "60"]


def test_what_is_known_is_copied_and_timed(tmp_path: Path) -> None:
    flags = ["--records", "40", "--shares", "0", "50", "100", "--width", "32"]
    to = tmp_path / "reuse.json"
    assert reuse.main([*flags, "--repeats", "2", "--to", str(to)]) == 0
    found: list[dict[str, Any]] = json.loads(to.read_text())["shares"]
    assert [one["share"] for one in found] == [0, 50, 100]
    for one in found:
        for whole, finding, copying in zip(
            one["whole"], one["finding"], one["copying"], strict=True
        ):
            assert whole > finding + copying > 0
            assert (copying > 0) == (one["share"] > 0)
