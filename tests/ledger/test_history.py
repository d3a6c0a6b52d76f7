"""History and queries: if this fails, nobody can tell which model made a file."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from lib.ledger.comments import table_comments, view_comments
from lib.ledger.database import open_for_writing, transaction, utc_now
from lib.units import count, duration, seconds_between, size
from schema.tables import Attempt, Checkpoint, Model, Run
from scripts import query
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Once, Place, Script, handled_by
from tests.processes import NOWHERE, Process
from tests.reference import write_fasta


@pytest.fixture
def a_run(script: Script, small_model: Path, once: Once) -> None:
    def embed() -> None:
        answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
        assert answer.status == 0

    once(embed)


def thousand_runs(place: Place) -> None:
    """Fill the database with 1,000 finished runs of five checkpoints each."""
    run = {
        "model_id": 1, "esm2_config": {"name": "esm2"}, "repr_layers": [33],
        "include": ["mean"], "precision": "float32", "per_tok_dtype": "float32",
        "max_residues": 1022, "long_sequences": "truncate", "unknown_residues": "error",
        "duplicate_ids": "error", "plan": "", "input_path": "/data/proteins.fasta",
        "input_bytes": 1, "input_sha256": "0", "records_total": 100, "sequences_total": 100,
        "residues_total": 30000, "records_truncated": 0, "residues_mapped": 0,
        "output_folder": str(place.output), "settings": {}, "status": "finished",
        "started_at": utc_now(), "finished_at": utc_now(),
    }  # fmt: skip
    attempt = {
        "host": "h", "pid": 1, "weights_path": "w", "device": "cpu",
        "device_name": "c", "threads": 2, "tokens_per_pack": 4096, "versions": {},
        "started_at": utc_now(), "heartbeat_at": utc_now(),
    }  # fmt: skip
    checkpoint = {
        "records": 20, "residues": 6000, "seconds": 2.0, "bytes": 1, "sha256": "0",
        "esm2_config": None, "committed_at": utc_now(),
    }  # fmt: skip
    numbers = range(1, 1001)
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.add(Model(name="esm2_t33_650M_UR50D", num_layers=33, hidden_dim=1280))
        session.flush()
        session.execute(insert(Run), [{**run, "uuid": str(number)} for number in numbers])
        session.execute(insert(Attempt), [{**attempt, "run_id": number} for number in numbers])
        places = [
            {
                "run_id": number, "attempt_id": number, "path": f"checkpoint-{part:06d}.parquet",
                "first_position": 20 * part, "stop_position": 20 * part + 20,
            }
            for number in numbers
            for part in range(5)
        ]  # fmt: skip
        session.execute(insert(Checkpoint), [{**checkpoint, **one} for one in places])


def test_history_of_a_thousand_runs_answers_in_half_a_second(place: Place) -> None:
    """The fastest of five counts: the others are slower, as other processes use the caches."""
    thousand_runs(place)
    for _ in range(5):
        start = seconds_of_children()
        answer = place.run_afresh("history")
        seconds = seconds_of_children() - start
        assert len(answer.out.splitlines()) == 1001
        if seconds < 0.5:
            break
    assert seconds < 0.5


def seconds_of_children() -> float:
    """Return processor seconds: the machine's other load is not what is tested."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", ["history", "query"])
def test_reading_scripts_never_import_torch(name: str) -> None:
    code = f"import sys, scripts.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_history_shows_runs_newest_first(
    script: Script, a_run: None, tall_model: Path, place: Place
) -> None:
    script("embed", "--esm-model", tall_model, "--input", SOME_PROTEINS, "--include", "bos")
    newest, oldest = script("history", "--json").json
    assert (newest["run"], newest["model"], newest["layers"]) == (2, "esm2_tall (untrained)", "3")
    assert (oldest["run"], oldest["include"], oldest["status"]) == (1, "mean", "finished")
    assert oldest["records_done"] == oldest["records_total"] == 15
    assert oldest["residues_per_second"] > 0
    assert oldest["started"] < oldest["finished"] < newest["started"]
    assert oldest["started"].endswith("Z")
    assert oldest["output"] == str(place.output / "run-000001")
    header, *lines = script("history").out.splitlines()
    assert header.split()[:3] == ["run", "model", "layers"]
    assert [line.split()[0] for line in lines] == ["2", "1"]


def test_a_run_has_the_label_and_the_precision_that_history_shows(
    script: Script, small_model: Path, place: Place
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--label"]
    assert script("embed", *flags, " gut 2026: é ", "--json").json["label"] == "gut 2026: é"
    place.set("compute", "precision", "bfloat16")
    assert script("embed", *flags, " ").status == 0
    second, first = script("history", "--json").json
    assert (first["label"], first["precision"]) == ("gut 2026: é", "float32")
    assert (second["label"], second["precision"]) == (None, "bfloat16")
    header, *lines = script("history").out.splitlines()
    assert header.split()[:6] == ["run", "label", "model", "layers", "include", "precision"]
    assert " bfloat16 " in lines[0]
    assert lines[1].startswith("  1  gut 2026: é  esm2_small (untrained) ")
    text = script("history", "--run", "1").out
    assert re.search(r"^label +gut 2026: é$", text, re.MULTILINE)
    assert re.search(r"^precision +float32$", text, re.MULTILINE)
    assert "\nlabel " not in script("history", "--run", "2").out
    page = script("report", "--run", "1", "--to", place.folder / "report.html")
    assert page.status == 0
    assert "<dt>label</dt><dd><bdi>gut 2026: é</bdi></dd>" in (
        place.folder / "report.html"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("label", "fact"),
    [
        ("x" * 61, "label: 61 characters, at most 60"),
        ("a\nb", r"label 'a\nb': not in one line of printable characters"),
        ("\x1b[31m", r"label '\x1b[31m': not in one line of printable characters"),
    ],
)
def test_a_label_that_fits_no_line_is_refused_before_the_work(
    script: Script, place: Place, small_model: Path, label: str, fact: str
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--label", label]
    answer = script("embed", *flags)
    assert (answer.status, answer.error) == (2, fact)
    assert not place.database.exists()


def test_history_of_one_run_has_its_attempts_and_checkpoints(script: Script, a_run: None) -> None:
    shown = script("history", "--run", "1", "--json").json
    (attempt,) = shown["attempts"]
    (checkpoint,) = shown["checkpoints"]
    assert (attempt["outcome"], attempt["device"], attempt["error"]) == ("finished", "cpu", None)
    assert (checkpoint["path"], checkpoint["records"]) == ("checkpoint-000001.parquet", 15)
    assert checkpoint["problem"] is None
    text = script("history", "--run", "1").out
    for part in ("status               finished", "attempts", "checkpoint-000001.parquet"):
        assert part in text


def test_history_of_an_unknown_run(script: Script, a_run: None) -> None:
    answer = script("history", "--run", "9")
    assert answer.status == 2
    assert answer.error.startswith("run 9: not in database")


def test_altered_rows_are_one_line(script: Script, a_run: None, place: Place) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql("UPDATE checkpoints SET bytes = 'many'")
    for flags in (["--run", "1"], ["--run", "1", "--json"], []):
        answer = script("history", *flags)
        if "--run" in flags and "--json" not in flags:
            assert answer.status == 4
            fact = f"database {place.database}: malformed rows: TypeError: "
            assert answer.error.startswith(fact)
        else:  # shown as it is
            assert answer.status == 0


def test_the_help_of_query_names_every_table_and_view() -> None:
    words = re.findall(r"\w+", query.__doc__ or "")
    tables, views = words.index("Tables"), words.index("Views")
    assert {*words[tables + 1 : views]} == {*table_comments()}
    assert {*words[views + 1 : words.index("Exit")]} == {*view_comments()}


def test_query_formats(script: Script, a_run: None) -> None:
    statement = "select run, status, percent from run_progress"
    assert script("query", statement).out == ("run  status    percent\n  1  finished    100.0\n")
    assert script("query", statement, "--format", "csv").out == (
        "run,status,percent\n1,finished,100.0\n"
    )
    expected = [{"run": 1, "status": "finished", "percent": 100.0}]
    assert script("query", statement, "--format", "json").json == expected
    assert script("query", statement, "--json").json == expected


def test_query_prints_what_json_does_not_have_or_refuses_it(script: Script, a_run: None) -> None:
    """Before, bytes were a traceback, 1e999 was Infinity, and of two columns one was lost."""
    answer = script("query", "--json", "select x'00ff' as b, 1e999 as a, -1e999 as c, 0.5 as d")
    assert answer.out.count("null") == 2
    assert answer.json == [{"b": "00ff", "a": None, "c": None, "d": 0.5}]
    twice = script("query", "--json", "select 1 as a, 2 as a")
    assert (twice.status, twice.out) == (2, "")
    assert twice.error == "SQL: 2 columns are named a"
    assert script("query", "select 1 as a, 2 as a").out == "a  a\n1  2\n"
    assert script("query", "select x'00ff' as bytes").out == "bytes\n00ff\n"
    assert script("query", "--format", "csv", "select x'00ff' as b").out == "b\n00ff\n"


@pytest.mark.parametrize(
    "statement",
    [
        "delete from runs",
        "update runs set status = 'x'",
        "drop table runs",
        "create table t (x)",
        "attach 'other.sqlite' as o",
        "vacuum into 'other.sqlite'",
        "select 1; delete from runs",
        "nonsense",
    ],
)
def test_query_changes_nothing(
    script: Script,
    a_run: None,
    place: Place,
    statement: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place.folder)
    before = place.database.read_bytes()
    answer = script("query", statement)
    assert answer.status == 2
    assert answer.error.startswith("SQL: ")
    assert place.database.read_bytes() == before
    assert not Path("other.sqlite").exists()


def test_control_characters_do_not_reach_the_terminal(script: Script, a_run: None) -> None:
    assert "\x1b" not in script("query", "select char(27) || '[31m' as x").out


def test_checkpoint_audit_says_what_is_wrong(script: Script, a_run: None, place: Place) -> None:
    for change, problem in (
        ("json_remove(esm2_config, '$.sha256')", "model metadata lacks sha256"),
        (
            "json_set(esm2_config, '$.sha256', 'x')",
            "model metadata differs from the run in sha256",
        ),
        ("NULL", "no model metadata (NULL)"),
    ):
        with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
            session.connection().exec_driver_sql(
                f"UPDATE checkpoints SET esm2_config = (SELECT {change} FROM runs)"
                if change == "NULL"
                else "UPDATE checkpoints SET esm2_config = "
                f"(SELECT {change.replace('esm2_config', 'runs.esm2_config')} FROM runs)"
            )
        answer = script("query", "select problem from checkpoint_audit", "--json")
        assert answer.json == [{"problem": problem}]


def test_model_usage_counts_runs_and_records(script: Script, a_run: None) -> None:
    (usage,) = script("query", "select * from model_usage", "--json").json
    assert (usage["model"], usage["runs"], usage["records"]) == ("esm2_small (untrained)", 1, 15)


def test_history_fits_the_terminal_and_never_cuts_a_model(
    script: Script, a_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, there in (("40", False), ("120", True)):
        monkeypatch.setenv("COLUMNS", columns)
        text = script("history").out
        assert max(map(len, text.splitlines())) <= int(columns)
        assert "esm2_small (untrained)" in text
        assert ("short_proteins.fasta" in text) is there
    monkeypatch.delenv("COLUMNS")
    assert "include" in script("history").out


def test_units_as_people_say_them() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.6, 185, 7200, 371_000)] == [
        "0.0 s", "9.9 s", "10 s", "1 min 0 s", "3 min 5 s", "2 h 0 min", "4 d 7 h",
    ]  # fmt: skip
    assert [size(b) for b in (0, 999, 1000, 159_996, 999_960, 2.6e9, 3.2e15)] == [
        "0 B", "999 B", "1.0 kB", "160.0 kB", "1.0 MB", "2.6 GB", "3.2 PB",
    ]  # fmt: skip
    assert [count(n) for n in (0, 2.5, 9, 117, 2978.7, 1e8)] == [
        "0", "2.5", "9", "117", "2,979", "100,000,000",
    ]  # fmt: skip


def test_a_clock_that_was_set_back_makes_no_time_below_nothing() -> None:
    """Before, `history` said `took -179972.4 s`."""
    noon, later = "2026-05-31T12:00:00.000Z", "2026-05-31T12:00:01.500Z"
    assert (seconds_between(noon, later), seconds_between(later, noon)) == (1.5, 0)
    assert seconds_between(noon, None) is seconds_between("noon", later) is None


def long_run(place: Place, model: Path) -> Process:
    """Start a run that commits often and cannot end by itself within the test."""
    as_letters = str.maketrans("0123456789", "ACDEFGHIKL")
    entries = [(f"p{i}", "MKTAYIAKQR" * 80 + str(i).translate(as_letters)) for i in range(5000)]
    source = write_fasta(place.folder / "long.fasta", entries)
    flags: list[str | Path] = ["--config", place.config, "--esm-model", model, "--input", source]
    flags += ["--set", "output.checkpoint_seconds=0.2", "--set", "compute.threads=1"]
    return processes.start("embed", *flags, out=NOWHERE, err=NOWHERE)


def watcher(place: Place, **how: Any) -> subprocess.Popen[str]:  # noqa: ANN401
    """Start history.py --watch, with SIGINT as in a shell's foreground."""
    command: list[str | Path] = [
        sys.executable,
        "-u",
        ROOT / "scripts" / "history.py",
        "--config",
        place.config,
    ]
    command += ["--watch", "--run", "1", "--every", "0.1"]
    # The tests may run in the background, where SIGINT is ignored, and would stay so.
    with handled_by(signal.SIGINT, signal.SIG_DFL):
        return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **how)


def wait_for_a_checkpoint(place: Place) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any(place.output.glob("run-000001/checkpoint-*.parquet")):
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint within a minute")


def test_watch_follows_a_live_run_until_it_ends(place: Place, small_model: Path) -> None:
    with long_run(place, small_model) as worker:
        wait_for_a_checkpoint(place)
        follower = watcher(place, stdout=subprocess.PIPE)
        assert follower.stdout is not None
        first, second = follower.stdout.readline(), follower.stdout.readline()
        worker.send_signal(signal.SIGINT)
        assert worker.end().status == 130
    out, err = follower.communicate(timeout=60)
    for line in (first, second):
        assert line.startswith("run 1 running: "), line
        assert re.search(r"[0-9,]+ of [0-9,]+ residues .*, .* residues/s, .* left$", line.strip())
    assert first != second
    assert out.splitlines()[-1].startswith("run 1 interrupted: ")
    assert (follower.returncode, err) == (0, "")


def test_watch_on_a_terminal_redraws_its_line_and_ends_at_ctrl_c(
    place: Place, small_model: Path
) -> None:
    ours, theirs = pty.openpty()
    with long_run(place, small_model):
        wait_for_a_checkpoint(place)
        follower = watcher(place, stdout=theirs)
        os.close(theirs)
        seen = b""
        while seen.count(b"\x1b[1F\x1b[J") < 2:
            seen += os.read(ours, 1 << 16)
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=60)
    os.close(ours)
    assert (follower.returncode, err) == (0, "")
    assert all(len(line) <= 80 for line in re.split(rb"\x1b\[1F\x1b\[J|\r\n", seen))


def test_watch_with_nothing_to_follow(script: Script, a_run: None) -> None:
    assert script("history", "--watch").out == "no run is running\n"
    assert script("history", "--watch", "--run", "1").out.startswith("run 1 finished: ")
    assert script("history", "--watch", "--run", "9").status == 2


def says_it() -> None:
    """Say `going on` within a query."""
    sqlite3.enable_callback_tracebacks(False)  # datasette wants them, which tests have imported
    going_on = partial(processes.say, "going on")
    processes.at_call("lib.ledger.sqlite_file._go_on", 3, going_on)


def test_ctrl_c_ends_a_query(a_run: None, place: Place) -> None:
    """SQLite does not look at signals by itself."""
    endless = (
        "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t"
    )
    with processes.start("query", endless, "--config", place.config, prepare=says_it) as process:
        process.wait_for("going on")
        process.send_signal(signal.SIGINT)
        answer = process.end()
    assert (answer.status, answer.error) == (130, "SIGINT: interrupted")
