"""The table of faults: if this fails, a command of docs/reliability.md repeats nothing."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module

from tests.conftest import ROOT, users_environment

PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_command_of_the_table_exists() -> None:
    commands = re.findall(r"`(make [^`]+)`", PAGE)
    assert len(commands) > 8
    files = 0
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        assert command.split()[1] in targets, command
        for file in re.findall(r"tests/[\w/]+\.py", command):
            assert (ROOT / file).is_file(), command
            files += 1
        for part in re.findall(r"--only (\w+)", command):
            assert callable(import_module(f"tests.torture.{part}").trials)
    assert files > 5


def test_a_command_of_the_table_runs_as_printed_for_a_moment() -> None:
    # Mutated files, each of which is read or refused; test_kill and test_damage run other parts.
    (command,) = set(re.findall(r"`(make torture ARGS='--only fuzz [^`]+)`", PAGE))
    moment, changed = re.subn(r"--rounds \d+", "--rounds 1", command)
    assert changed == 1
    done = subprocess.run(
        ["sh", "-c", moment],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, last = done.stdout.splitlines()[1:]
    table = [re.split(r"  +", row.strip()) for row in rows]
    assert len({what for what, *_ in table}) == 15
    assert {(trials, lost) for _, trials, _, lost in table} == {("80", "nothing")}
    assert last == "1200 trials, 0 kinds lost something"
