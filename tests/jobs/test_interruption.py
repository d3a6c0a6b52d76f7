"""Signals: if this fails, Ctrl-C hangs, loses finished work, or leaves half a run behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SOME_PROTEINS, Answer, Place, Script

# Runs embed.py with a function that says when it is reached, and then takes its time.
SLOW = """
import sys, time
from importlib import import_module
from lib.console.program import guarded
from scripts.embed import main
target, nth, seconds, *argv = sys.argv[1:]
module, _, name = target.rpartition(".")
holder = import_module(module)
true, calls = getattr(holder, name), 0
def slow(*arguments, **named):
    global calls
    calls += 1
    if calls == int(nth):
        print("reached", file=sys.stderr, flush=True)
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until:
            time.sleep(0.01)
    return true(*arguments, **named)
setattr(holder, name, slow)
sys.exit(guarded(main, argv))
"""


def signalled(
    place: Place, model: Path, target: str, nth: int, seconds: float, *numbers: signal.Signals
) -> tuple[Answer, float]:
    """Send signals once `target` is reached the nth time; return the end and how long it took."""
    flags = ["--esm-model", model, "--input", SOME_PROTEINS, "--config", place.config]
    flags += ["--set", "compute.tokens_per_pack=900"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, target, str(nth), str(seconds), *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.endswith("reached\n"):  # the bar ends no line
                break
        since = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        said += process.stderr.read()
        status = process.wait(timeout=60)
    return Answer(status, "", said), time.monotonic() - since


def test_a_second_sigint_ends_at_once_and_loses_only_what_is_not_committed(
    script: Script, place: Place, small_model: Path
) -> None:
    twice = (signal.SIGINT, signal.SIGINT)
    answer, seconds = signalled(place, small_model, "lib.network.pipeline.launch", 4, 60, *twice)
    assert answer.status == 130
    assert answer.error == "SIGINT: interrupted"
    assert seconds < 20
    detail = script("history", "--run", "1", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["interrupted"]
    assert [path.name for path in (place.output / "run-000001").iterdir()] == [".lock"]
    assert script("resume").status == 0


# Runs embed.py with packs that take so many seconds, and say when they begin and have ended.
SLOW_PACKS = """
import sys, time
import lib.network.pipeline
from lib.console.program import guarded
from scripts.embed import main
seconds, *argv = sys.argv[1:]
true = lib.network.pipeline.launch
def slow(*arguments, **named):
    print("begins", file=sys.stderr, flush=True)
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        time.sleep(0.01)
    vectors = true(*arguments, **named)
    print("ends", time.monotonic(), file=sys.stderr, flush=True)
    return vectors
lib.network.pipeline.launch = slow
sys.exit(guarded(main, argv))
"""
PACK_SECONDS = 4.0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_commits_within_a_packs_time(
    script: Script, place: Place, small_model: Path, number: signal.Signals, status: int
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--config", place.config]
    flags += ["--set", "compute.tokens_per_pack=900"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_PACKS, str(PACK_SECONDS), *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while not process.stderr.readline().endswith("begins\n"):  # the bar ends no line
            assert process.poll() is None
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(timeout=60) == status
        ended = time.monotonic()
    # The pack that was computed is the last, and is committed: less than another pack's time goes.
    assert "begins" not in said
    (pack_ended,) = [line.split()[-1] for line in said.splitlines() if "ends " in line]
    assert ended - float(pack_ended) < PACK_SECONDS
    assert f"error: {number.name}: run 1 interrupted, finished work committed" in said
    detail = script("history", "--run", "1", "--json").json
    assert detail["status"] == "interrupted"
    assert len(detail["checkpoints"]) == 1
    assert 0 < detail["records_done"] < detail["records_total"]


@pytest.mark.parametrize(
    "target", ["scripts.embed.preflight", "scripts.embed.load_model", "scripts.embed.create_run"]
)
def test_ctrl_c_during_set_up_leaves_no_half_made_run(
    script: Script, place: Place, small_model: Path, target: str
) -> None:
    answer, seconds = signalled(place, small_model, target, 1, 1.5, signal.SIGINT)
    assert answer.status == 130
    assert seconds < 15
    runs = script("history", "--json").json if place.database.exists() else []
    # Recorded whole, so that it can be resumed, or not at all.
    assert [run["status"] for run in runs] == (
        ["interrupted"] if target.endswith("create_run") else []
    )
    assert place.output.exists() == bool(runs)


def test_a_second_process_is_refused_while_the_first_lives(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--config", place.config]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, "lib.network.pipeline.launch", "1", "60", *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stderr is not None
        while not first.stderr.readline().endswith("reached\n"):
            assert first.poll() is None
        answer = script("resume", "--run", "1")
        (attempt,) = script("history", "--run", "1", "--json").json["attempts"]
        first.kill()
    assert answer.status == 4
    where = f"process {first.pid} on {os.uname().nodename}"
    assert answer.error == f"run 1: owned by {where} since {attempt['started']}"
    assert script("resume", "--run", "1").status == 0


def test_ctrl_c_does_not_wait_for_the_digest_of_a_large_file(
    script: Script, place: Place, small_model: Path
) -> None:
    answer, seconds = signalled(
        place, small_model, "lib.models.fair_esm_file.file_sha256", 1, 60, signal.SIGINT
    )
    assert answer.status == 130
    assert answer.error == "SIGINT: interrupted"
    assert seconds < 20


def test_a_folder_in_a_checkpoints_place_leaves_no_attempt_open(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=900"]
    begun = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS, *flags)
    assert begun.status == 0
    file = place.output / "run-000001" / "checkpoint-000002.parquet"
    file.unlink()
    file.mkdir()
    (file / "notes.txt").write_text("a user's own")
    answer = script("resume", "--run", "1", "--recompute-damaged")
    assert answer.status == 4
    assert answer.error == f"{file}: Directory not empty"
    detail = script("history", "--run", "1", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["finished", "failed"]
    assert detail["status"] == "failed"
    assert (file / "notes.txt").read_text() == "a user's own"
    (file / "notes.txt").unlink()
    assert script("resume", "--run", "1").status == 0
    assert script("validate", "--run", "1").status == 0
