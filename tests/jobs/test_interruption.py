"""Signals: if this fails, Ctrl-C hangs, loses finished work, or leaves half a run behind."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine

from lib.errors import MachineError
from lib.jobs.interruption import Interruption
from lib.ledger.runs import Ownership, finish_run
from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script, handled_by
from tests.processes import Process

LAUNCH = "lib.network.pipeline.launch"


def embed_flags(place: Place, model: Path) -> list[str | Path]:
    flags: list[str | Path] = ["--esm-model", model, "--input", SOME_PROTEINS]
    flags += ["--config", place.config]
    # On one thread a pack is computed by the thread that signals interrupt.
    return [*flags, "--set", "compute.tokens_per_pack=300", "--set", "compute.threads=1"]


def stopped(place: Place, model: Path, target: str, nth: int) -> Process:
    """Start embed.py and wait until it pauses at a function; it goes on if there is a file gate."""
    prepare = partial(processes.stop_at, target, nth, place.folder / "gate")
    process = processes.start("embed", *embed_flags(place, model), prepare=prepare)
    process.wait_for("reached")
    return process


def test_a_second_sigint_ends_at_once_and_loses_only_what_is_not_committed(
    script: Script, place: Place, small_model: Path
) -> None:
    with stopped(place, small_model, LAUNCH, 4) as process:
        process.send_signal(signal.SIGINT)
        process.wait_for("received")
        process.send_signal(signal.SIGINT)
        answer = process.end()  # though the pause would have no end
    assert answer.status == 130
    assert answer.error == "SIGINT: interrupted"
    detail = script("history", "--run", "1", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["interrupted"]
    assert [path.name for path in (place.output / "run-000001").iterdir()] == [".lock"]
    assert script("resume").status == 0


def told_packs(gate: Path) -> None:
    """Say when a pack begins and when it has ended; pause within the first."""
    processes.stop_at(LAUNCH, 1, gate)
    processes.at_call(LAUNCH, 0, partial(processes.say, "ends"), after=True)
    processes.at_call(LAUNCH, 0, partial(processes.say, "begins"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_commits_within_a_packs_time(
    script: Script, place: Place, small_model: Path, number: signal.Signals, status: int
) -> None:
    gate = place.folder / "gate"
    prepare = partial(told_packs, gate)
    with processes.start("embed", *embed_flags(place, small_model), prepare=prepare) as process:
        process.wait_for("reached")
        process.send_signal(number)
        process.wait_for("received")
        gate.touch()
        answer = process.end()
    assert answer.status == status
    # The pack that was being computed is the last, and is committed.
    said = answer.err
    assert [line for line in said.splitlines() if line in ("begins", "ends")] == ["ends"]
    assert f"error: {number.name}: run 1 interrupted, finished work committed" in said
    detail = script("history", "--run", "1", "--json").json
    assert detail["status"] == "interrupted"
    assert len(detail["checkpoints"]) == 1
    assert 0 < detail["records_done"] < detail["records_total"]


@pytest.mark.parametrize(
    "target",
    [
        "scripts.embed.preflight",
        "lib.jobs.computing.load_model",
        "lib.console.embedding.create_run",
    ],
)
def test_ctrl_c_during_set_up_leaves_no_half_made_run(
    script: Script, place: Place, small_model: Path, target: str
) -> None:
    with stopped(place, small_model, target, 1) as process:
        process.send_signal(signal.SIGINT)
        (place.folder / "gate").touch()
        answer = process.end()
    assert answer.status == 130
    runs = script("history", "--json").json if place.database.exists() else []
    # Recorded whole, so that it can be resumed, or not at all.
    assert [run["status"] for run in runs] == (
        ["interrupted"] if target.endswith("create_run") else []
    )
    assert place.output.exists() == bool(runs)


@pytest.mark.parametrize(
    ("target", "flags"),
    [
        ("lib.jobs.admission.detect", ["--run", "1"]),
        ("lib.jobs.admission.preflight", ["--run", "1"]),
        ("lib.jobs.validation.load_run", []),
        ("lib.jobs.admission.check_settings", []),
    ],
    ids=["weights", "input", "unfinished runs", "their settings"],
)
def test_a_signal_is_no_fact_about_a_run(
    script: Script, place: Place, small_model: Path, target: str, flags: list[str]
) -> None:
    """Before, validate printed the run as damaged by SIGTERM, and went on."""
    assert script("embed", *embed_flags(place, small_model)).status == 0
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute("UPDATE runs SET status = 'interrupted'")

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, interrupted)
        answer = script("validate", "--json", "--esm-model", small_model, *flags)
    assert (answer.status, answer.error) == (143, "SIGTERM: interrupted")
    assert answer.out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_to_be_ignored_stays_so(
    script: Script, place: Place, small_model: Path, number: signal.Signals
) -> None:
    """Before, `nohup` was of no use: SIGHUP ended the run."""

    def finish(engine: Engine, ownership: Ownership) -> None:
        signal.raise_signal(number)
        finish_run(engine, ownership)

    with handled_by(number, signal.SIG_IGN), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.jobs.embedding.finish_run", finish)
        assert script("embed", *embed_flags(place, small_model)).status == 0
        interruption = Interruption()
        with interruption.handled():
            signal.signal(number, signal.default_int_handler)  # as a library may do
            interruption.handle_again()
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert interruption.requested is None


def test_a_second_process_is_refused_while_the_first_lives(
    script: Script, place: Place, small_model: Path
) -> None:
    with stopped(place, small_model, LAUNCH, 1) as first:
        answer = script("resume", "--run", "1")
        (attempt,) = script("history", "--run", "1", "--json").json["attempts"]
        pid = first.pid
    assert answer.status == 4
    where = f"process {pid} on {os.uname().nodename}"
    assert answer.error == f"run 1: owned by {where} since {attempt['started']}"
    assert script("resume", "--run", "1").status == 0


def test_ctrl_c_does_not_wait_for_the_digest_of_a_large_file(
    script: Script, place: Place, small_model: Path
) -> None:
    with stopped(place, small_model, "lib.models.held_file.HeldFile.sha256", 1) as process:
        process.send_signal(signal.SIGINT)
        answer = process.end()  # though the digest would have no end
    assert answer.status == 130
    assert answer.error == "SIGINT: interrupted"


def test_a_folder_in_a_checkpoints_place_is_kept_aside_with_what_is_in_it(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
    begun = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS, *flags)
    assert begun.status == 0
    file = place.output / "run-000001" / "checkpoint-000002.parquet"
    file.unlink()
    file.mkdir()
    (file / "notes.txt").write_text("a user's own")
    answer = script("resume", "--run", "1", "--recompute-damaged")
    assert answer.status == 0, answer.err
    kept = file.with_name(f".{file.name}.kept-1")
    assert f"{file.name}: dropped, kept as {kept.name}, to be computed again" in answer.err
    assert (kept / "notes.txt").read_text() == "a user's own"
    detail = script("history", "--run", "1", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["finished", "finished"]


def test_an_attempt_that_fails_before_its_work_is_not_left_open(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
    begun = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS, *flags)
    assert begun.status == 0
    (place.output / "run-000001" / "checkpoint-000002.parquet").unlink()

    def fails(*_: object) -> None:
        raise MachineError("the disk fails")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.resume.adopt_leftovers", fails)
        answer = script("resume", "--run", "1", "--recompute-damaged")
    assert (answer.status, answer.error) == (4, "the disk fails")
    detail = script("history", "--run", "1", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["finished", "failed"]
    assert detail["status"] == "failed"
    assert script("resume", "--run", "1").status == 0
    assert script("validate", "--run", "1").status == 0
