"""A terminal of 80 columns: if this fails, lines wrap there, or the time left is cut off."""

from __future__ import annotations

import os
import pty
import re
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lib.console.bars import ResidueBar
from lib.console.output import LiveLines, print_table
from lib.jobs.progress import Progress
from lib.ledger.overview import progress_lines
from lib.units import first_within, shortened_to
from scripts.history import main as history
from scripts.resume import main as resume
from tests.conftest import SOME_PROTEINS, Place, Script

Screen = list[str]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Iterator[Screen]:
    """Let stdout and stderr be a terminal in the block; after it, the list has what it showed.

    A line is what stood between two ends of lines, as it was when another took its place.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    lines: Screen = []
    with os.fdopen(theirs, "w") as screen, monkeypatch.context() as patch:
        # Several processes of tests have it set to the terminal that they are started from.
        patch.delenv("COLUMNS", raising=False)
        patch.setattr("sys.stdout", screen)
        patch.setattr("sys.stderr", screen)
        yield lines
    reader.join()
    os.close(ours)
    text = b"".join(parts).decode()
    lines += [line for line in re.split(r"[\r\n]+|\x1b\[\d+F\x1b\[J", text) if line]


@pytest.fixture
def a_run(script: Script, small_model: Path) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    label = "phages of the gut, the second try of all"
    answer = script("embed", *flags, "--label", label)
    assert answer.status == 0, answer.err


def test_history_has_label_and_input_and_never_wraps(
    a_run: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (80, 60, 40):
        with terminal(monkeypatch, columns) as lines:
            history(["--config", str(place.config)])
        assert max(map(len, lines)) <= columns
        header, line = lines
        assert "esm2_small (untrained)" in line
        if columns == 80:
            assert header.split() == ["run", "label", "model", "status", "records", "input"]
            assert re.search(r" phages .*….* of all  ", line)
            assert re.search(r" short_.*…\.?fasta$", line)
    with terminal(monkeypatch, 200) as lines:
        history(["--config", str(place.config)])
    assert " phages of the gut, the second try of all " in lines[1]
    assert lines[1].endswith(" short_proteins.fasta")


def test_a_name_that_no_line_holds_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[7, "m" * 300, "finished", "a.fasta"]]
    with terminal(monkeypatch) as lines:
        print_table(["run", "model", "status", "input"], rows, shortened={"input": 3})
    assert max(map(len, lines)) == 80
    assert "m…m" in lines[1]
    assert lines[1].endswith("  finished  a…a")


def test_the_properties_that_resume_shows_never_wrap(
    a_run: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as lines:
        resume(["--config", str(place.config), "--run", "1"])
    start = next(i for i, line in enumerate(lines) if line.startswith("property "))
    table = lines[start : start + 13]
    assert table[-1].startswith("untrained ")
    assert max(map(len, table)) <= 80
    (digest,) = [line.split()[1] for line in table if line.startswith("sha256 ")]
    assert re.fullmatch("[0-9a-f]{12,}…[0-9a-f]{12,}", digest)
    assert any("checkpoint metadata, tensor shapes" in line for line in table)


def test_the_time_left_is_never_cut_off_under_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "run": 1204, "status": "running", "residues_done": 142_196_000,
        "residues_total": 2_411_056_000, "percent": 5.9, "checkpoints": 1_480,
        "residues_per_second": 12_140.3,
    }  # fmt: skip
    lines = {}
    for columns in (130, 80, 60, 40):
        with terminal(monkeypatch, columns) as shown:
            LiveLines().show([progress_lines(state)])
        (lines[columns],) = shown
        assert len(lines[columns]) <= columns
        assert lines[columns].endswith(", 2 d 3 h left")
    everything = "2,411,056,000 residues (5.9 %) in 1,480 checkpoints, 12,140 residues/s, "
    assert everything in lines[130]
    assert lines[80].startswith("run 1204 running: 142,196,000 of 2,411,056,000 residues (5.9 %)")
    assert lines[60] == lines[40] == "run 1204 running: 5.9 %, 2 d 3 h left"


@pytest.mark.parametrize("columns", [200, 80, 60])
def test_the_time_left_is_never_cut_off_behind_the_bar(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    lengths = np.full(40_000, 1_000, np.int32)
    now = 0.0
    progress = Progress(lengths, 320, [range(1_000)], clock=lambda: now)
    progress.copied(1_234_567)
    with terminal(monkeypatch, columns) as lines, ResidueBar(progress) as bar:
        for _ in range(3):
            now += 10.0
            bar.advance([1_000] * 10)
            bar._bar.refresh()
    shown = [line for line in lines if " left" in line]
    assert shown
    for line in shown:
        assert line.startswith("embedding   ")
        assert len(line) < columns
        assert line.endswith(" 10 h 49 min left") or line.endswith(" 10 h 50 min left"), line
    everything = (
        "1,234,567 sequences copied, 1,030,000 of 40,000,000 residues (1,000,000 before), "
        "1,000 res/s, "
    )
    assert (everything in shown[-1]) is (columns == 200)


@pytest.mark.parametrize(
    ("width", "short"),
    [(10, "0123456789"), (9, "0123…6789"), (5, "01…89"), (4, "01…9"), (1, "…"), (0, "")],
)
def test_a_text_is_shortened_in_its_middle(width: int, short: str) -> None:
    assert shortened_to(width, "0123456789") == short


def test_of_several_texts_the_first_that_fits() -> None:
    texts = ["three", "two", "o"]
    found = [first_within(width, texts) for width in (9, 5, 4, 2, 0)]
    assert found == ["three", "three", "two", "o", "o"]
