"""The table of faults: if this fails, a command of docs/reliability.md repeats nothing."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_every_command_of_the_table_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    commands = re.findall(r"`(make [^`]+)`", text)
    assert len(commands) > 8
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        assert command.split()[1] in targets, command
        for file in re.findall(r"tests/\w+\.py", command):
            assert (ROOT / file).is_file(), command
        for part in re.findall(r"--only (\w+)", command):
            assert "\ndef trials(" in (ROOT / "tests" / "torture" / f"{part}.py").read_text()
