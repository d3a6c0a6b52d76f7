"""A database in trouble: if this fails, a foreign lock or a bad page costs finished work."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from lib.ledger import commit, database, sqlite_file
from schema.tables import Checkpoint
from tests import processes
from tests.conftest import SOME_PROTEINS, Answer, Place, Script
from tests.torture import strace
from tests.torture.locked import held


def embed(script: Script, model: Path, *flags: str | Path) -> Answer:
    small = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
    return script("embed", "--esm-model", model, "--input", SOME_PROTEINS, *small, *flags)


def test_a_lock_is_waited_for_longer_than_sqlite_does_by_itself(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    # Python's sqlite3 gives up after five seconds; here after a moment, if nobody says how long.
    for module in (sqlite3, sqlite3.dbapi2):
        monkeypatch.setattr(module, "connect", partial(sqlite3.connect, timeout=0.2))
    seconds = 0.5
    holders: list[subprocess.Popen[str]] = []
    true_open = database.open_for_writing

    def open_while_locked(url: str, **named: Any) -> AbstractContextManager[Engine]:  # noqa: ANN401
        holders.append(held(place.database, seconds))
        by_itself = closing(sqlite3.connect(place.database))
        with by_itself as connection, pytest.raises(sqlite3.OperationalError, match="is locked"):
            connection.execute("BEGIN IMMEDIATE")
        return true_open(url, **named)

    monkeypatch.setattr("scripts.embed.open_for_writing", open_while_locked)
    assert embed(script, small_model).status == 0
    (holder,) = holders
    assert holder.wait(60) == 0  # nobody has cut its seconds short
    holder.communicate()


def test_a_lock_for_ever_is_one_line_in_bounded_time_and_no_work_is_lost(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.2)
    true_add = commit.add_checkpoint
    holders: list[subprocess.Popen[str]] = []

    def add(*arguments: Any) -> Checkpoint:  # noqa: ANN401
        row = true_add(*arguments)
        if not holders:
            holders.append(held(place.database, 600))
        return row

    monkeypatch.setattr("lib.ledger.commit.add_checkpoint", add)
    answer = embed(script, small_model)
    assert [holder.poll() for holder in holders] == [None]  # the lock is still held
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


def test_a_schema_that_is_not_utf8_is_one_line(
    script: Script, place: Place, small_model: Path
) -> None:
    # SQLite's message quotes it, which Python cannot decode; found by altering databases.
    place.run("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    content = place.database.read_bytes()
    assert b"CREATE TABLE attempts" in content
    place.database.write_bytes(
        content.replace(b"CREATE TABLE attempts", b"CREATE \xffABLE attempts")
    )
    for name in ("resume", "history", "validate", "query"):
        flags = ["select 1"] if name == "query" else ["--run", "1"]
        answer = script(name, *flags)
        assert answer.status == 4, (name, answer.err)
        assert answer.error == f"database {place.database}: malformed, its text is not UTF-8"


def test_eight_readers_never_stop_the_writer(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    # So long a read waits for others, by SQLite's own count, before it fails.
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 10)
    stop = threading.Event()
    reads: list[int] = []
    failed: list[str] = []

    def read() -> None:
        count = 0
        while not stop.is_set():
            try:
                with closing(sqlite_file.connect_read_only(place.database)) as connection:
                    connection.execute("SELECT * FROM run_history").fetchall()
            except Exception as error:
                failed.append(str(error))
                return
            count += 1
        reads.append(count)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    # And one that goes on reading what was there before the run.
    slow = sqlite_file.connect_read_only(place.database)
    slow.execute("BEGIN")
    before = slow.execute("SELECT count(*) FROM checkpoints").fetchall()
    try:
        answer = embed(script, small_model)
        assert slow.execute("SELECT count(*) FROM checkpoints").fetchall() == before
    finally:
        slow.close()
        stop.set()
        for reader in readers:
            reader.join()
    assert answer.status == 0, answer.err
    assert not failed
    assert len(reads) == 8
    assert min(reads) > 0


def test_where_wal_cannot_work_a_rollback_journal_does_and_is_said(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_connect: Callable[..., sqlite3.Connection] = sqlite3.connect

    def connect(database: str | Path, **named: Any) -> sqlite3.Connection:  # noqa: ANN401
        if isinstance(database, Path):
            # Of SQLite's own ways to use a file system, the one that shares no memory.
            return true_connect(f"file:{database}?vfs=unix-none", uri=True, **named)
        return true_connect(database, **named)

    monkeypatch.setattr("lib.ledger.database.sqlite3.connect", connect)
    answer = embed(script, small_model)
    assert answer.status == 0, answer.err
    fact = f"database {place.database}: journal mode delete, WAL does not work there"
    assert answer.err.splitlines().count(fact) == 1
    assert not Path(f"{place.database}-wal").exists()
    assert script("validate", "--run", "1").status == 0


@pytest.mark.skipif(not strace.is_there(), reason="strace is not there, or may not trace")
def test_a_file_system_that_maps_no_shared_memory_is_worked_on_without_wal(
    script: Script, place: Place, small_model: Path
) -> None:
    # As network file systems do, the kernel refuses to map SQLite's -shm file.
    refusing = ["-o", os.devnull, "-P", f"{place.database}-shm"]
    refusing += ["-e", "trace=mmap", "-e", "inject=mmap:error=ENODEV"]
    weights: list[str | Path] = ["--esm-model", small_model, "--input", SOME_PROTEINS]

    def there(name: str, *argv: str | Path) -> Answer:
        prepare = partial(strace.attach, refusing)
        return processes.run(name, *argv, "--config", place.config, prepare=prepare)

    fact = f"database {place.database}: journal mode delete, WAL does not work there"
    assert fact in there("embed", *weights).err
    assert there("history", "--json").json[0]["status"] == "finished"
    # Back where WAL works, and again where it does not.
    assert embed(script, small_model).status == 0
    with closing(sqlite3.connect(place.database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert there("history").error == (
        f"database {place.database}: WAL does not work there: disk I/O error (SQLITE_IOERR_SHMMAP)"
    )
    assert fact in there("embed", *weights).err
    assert [row["run"] for row in there("history", "--json").json] == [3, 2, 1]
