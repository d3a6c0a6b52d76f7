"""Programs: if these fail, what a user wrote on the command line ends in a traceback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
NOT_UTF8 = os.fsdecode(b"m\xff")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_argument_that_is_not_utf8_is_one_line(name: str) -> None:
    """Before, a script ended in a traceback as soon as it stored or printed the path."""
    answer = processes.run(name, "--config", f"{NOT_UTF8}/config.ini")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "error: argument 'm\\udcff/config.ini': not UTF-8\n"


def test_a_current_folder_that_is_not_utf8_is_one_line(place: Place, small_model: Path) -> None:
    folder = place.folder / NOT_UTF8
    folder.mkdir()
    shutil.copy(SOME_PROTEINS, folder / "some.fasta")
    flags = ["--esm-model", small_model, "--config", place.config, "--input", "some.fasta"]
    answer = processes.run("embed", *flags, folder=folder)
    assert answer.status == 2
    assert answer.error == f"'{place.folder}/m\\udcff/some.fasta': not UTF-8"
    assert list(place.output.rglob("*.parquet")) == []
