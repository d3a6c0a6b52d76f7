"""A database in trouble: if this fails, a foreign lock or a bad page costs finished work."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from lib import database, sqlite_file
from tests.conftest import ROOT, SOME_PROTEINS, Answer, Place, Script

# Holds a write lock for so many seconds.
HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""


def embed(script: Script, model: Path, *flags: str | Path) -> Answer:
    small = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=900"]
    return script("embed", "--esm-model", model, "--input", SOME_PROTEINS, *small, *flags)


def held(path: Path, seconds: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_lock_of_ten_seconds_is_waited_for(
    script: Script, place: Place, small_model: Path
) -> None:
    assert embed(script, small_model).status == 0
    with held(place.database, 10):
        since = time.monotonic()
        assert embed(script, small_model).status == 0
        assert time.monotonic() - since > 5


def test_a_lock_for_ever_is_one_line_in_bounded_time_and_no_work_is_lost(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    monkeypatch.setattr(database, "BUSY_SECONDS", 1)
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 1)
    true_add = __import__("lib.embedding", fromlist=["add_checkpoint"]).add_checkpoint
    holders: list[subprocess.Popen[str]] = []

    def add(*arguments: object) -> None:
        true_add(*arguments)
        if not holders:
            holders.append(held(place.database, 600))

    monkeypatch.setattr("lib.embedding.add_checkpoint", add)
    since = time.monotonic()
    answer = embed(script, small_model)
    assert time.monotonic() - since < 60
    assert answer.status == 4
    assert answer.error == f"database {place.database}: database is locked"
    for holder in holders:
        holder.kill()
        holder.communicate()
    monkeypatch.undo()
    flags = ["--config", place.config]
    assert len(script("history", "--run", "2", "--json", *flags).json["checkpoints"]) == 1
    assert script("resume", "--run", "2", *flags).status == 0
    assert script("validate", "--run", "2", *flags).status == 0


@pytest.mark.parametrize("kind", ["pages of noise", "cut"])
def test_a_broken_database_is_one_line_and_the_files_stay(
    script: Script, place: Place, small_model: Path, kind: str
) -> None:
    # A process of its own: its end puts all that it wrote into the one file.
    begun = place.run("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert begun.status == 0
    content = place.database.read_bytes()
    kept = sorted(path.read_bytes() for path in place.output.rglob("*.parquet"))
    if kind == "cut":
        place.database.write_bytes(content[: len(content) // 3])
    else:
        place.database.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
    for name, *flags in (("resume", "--run", "1"), ("history",), ("validate", "--run", "1")):
        answer = script(name, *flags)
        assert answer.status in (2, 4), (name, answer.err)
        assert "malformed" in answer.error or "disk image" in answer.error
    assert sorted(path.read_bytes() for path in place.output.rglob("*.parquet")) == kept


def test_eight_readers_never_stop_the_writer(
    script: Script, place: Place, small_model: Path
) -> None:
    assert embed(script, small_model).status == 0
    stop = threading.Event()
    slowest: list[float] = []
    failed: list[str] = []

    def read() -> None:
        worst = 0.0
        while not stop.is_set():
            since = time.monotonic()
            try:
                with closing(sqlite_file.connect_read_only(place.database)) as connection:
                    connection.execute("SELECT * FROM run_history").fetchall()
            except Exception as error:
                failed.append(str(error))
                return
            worst = max(worst, time.monotonic() - since)
        slowest.append(worst)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    try:
        answer = embed(script, small_model)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert answer.status == 0, answer.err
    assert not failed
    assert len(slowest) == 8
    assert max(slowest) < 10


def test_a_folder_where_wal_cannot_work_is_refused_with_the_fact(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_connect = sqlite3.connect

    class NoSharedMemory(sqlite3.Connection):
        """As SQLite answers where its -shm file cannot be mapped: the mode stays what it was."""

        def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
            if "journal_mode" in sql:
                sql = "PRAGMA journal_mode"
            return super().execute(sql, *arguments)  # type: ignore[arg-type]

    def connect(*arguments: object, **named: object) -> sqlite3.Connection:
        return true_connect(*arguments, **named, factory=NoSharedMemory)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr("lib.database.sqlite3.connect", connect)
    answer = embed(script, small_model)
    assert answer.status == 4
    fact = "journal mode is delete, WAL does not work there"
    assert answer.error == f"database {place.database}: {fact}"


def test_a_database_deleted_mid_run_is_said_and_the_files_stay(
    script: Script, place: Place, small_model: Path
) -> None:
    code = "import pathlib, sys, lib.embedding\nfrom lib.console import guarded\n"
    code += "from scripts.embed import main\ntrue = lib.embedding.add_checkpoint\ncalls = []\n"
    code += "def add(*a):\n    true(*a)\n    calls.append(1)\n    if len(calls) == 1:\n"
    code += "        [p.unlink() for p in pathlib.Path(sys.argv[1]).glob('runs.sqlite*')]\n"
    code += "lib.embedding.add_checkpoint = add\nsys.exit(guarded(main, sys.argv[2:]))"
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--config", place.config]
    flags += ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=900"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(place.folder), *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    answer = Answer(done.returncode, done.stdout, done.stderr)
    assert answer.status == 4, answer.err
    assert answer.error.startswith(f"database {place.database}: ")
    assert len(list((place.output / "run-000001").glob("checkpoint-*"))) >= 1
