"""Read-only places: if this fails, published results cannot be read, or are read without their end.

Processes of root lay down their capabilities first, so that permissions count for them, too.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script

_CAPABILITY_VERSION_3 = 0x20080522


@pytest.fixture
def finished(script: Script, place: Place, small_model: Path) -> Place:
    assert script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS).status == 0
    return place


def lock_up(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def unlock(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755)


def powerless() -> None:
    if os.geteuid() == 0:
        header, nothing = struct.pack("Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
        assert ctypes.CDLL(None).capset(header, nothing) == 0


def answer(place: Place, name: str, *argv: str | Path) -> processes.Answer:
    return processes.run(name, *argv, "--config", place.config, prepare=powerless)


def test_a_run_is_read_where_nothing_can_be_written(finished: Place, tmp_path: Path) -> None:
    before = {path.name for path in finished.folder.iterdir()}
    assert not any("-wal" in name for name in before)
    lock_up(finished.folder)
    try:
        for name, *flags in [
            ("history",),
            ("query", "select count(*) from run_history"),
            ("validate", "--run", "1"),
        ]:
            done = answer(finished, name, *flags)
            assert done.status == 0, (name, done)
        assert {path.name for path in finished.folder.iterdir()} == before
    finally:
        unlock(finished.folder)


def test_a_run_whose_folder_may_not_be_read_is_not_called_killed(finished: Place) -> None:
    """Before, a run that another user's process computes was."""
    with closing(sqlite3.connect(finished.database)) as connection, connection:
        connection.execute("UPDATE runs SET status = 'running'")
    folder = finished.output / "run-000001"
    statuses = []
    for mode in (0o000, 0o755):
        folder.chmod(mode)
        statuses += [run["status"] for run in answer(finished, "history", "--json").json]
    assert statuses == ["running", "killed"]


@pytest.mark.parametrize("at_rest", [False, True], ids=["open", "an empty log is left"])
def test_a_log_is_not_left_out(finished: Place, at_rest: bool) -> None:
    with closing(sqlite3.connect(finished.database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE runs SET status = 'failed'")
        connection.commit()
        there = Place(finished.folder / "there")
        there.folder.mkdir()
        for path in [finished.database, finished.config, Path(f"{finished.database}-wal")]:
            shutil.copy(path, there.folder)
    log = there.folder / "runs.sqlite-wal"
    assert log.stat().st_size > 0
    if at_rest:
        log.write_bytes(b"")
    lock_up(there.folder)
    try:
        done = answer(there, "query", "select status from runs", "--format", "csv")
        if at_rest:
            assert done.out == "status\nfinished\n"
        else:  # what it says is not what the database says
            assert done.status == 4
            assert done.error == f"database {there.database}: unable to open database file"
    finally:
        unlock(there.folder)


def test_who_may_only_read_locks_nobody_out(finished: Place) -> None:
    """In a folder that a group may write to, SQLite would leave files that are the reader's own."""
    before = {path.name for path in finished.folder.iterdir()}
    finished.database.chmod(0o444)
    assert answer(finished, "history").status == 0
    assert {path.name for path in finished.folder.iterdir()} == before


@pytest.mark.parametrize("name", ["runs.sqlite", "runs.sqlite-wal", "runs.sqlite-shm"])
def test_a_database_that_may_only_be_read_is_told_before_the_work(
    finished: Place, name: str
) -> None:
    file = finished.folder / name
    file.touch()
    file.chmod(0o444)
    folders = {*finished.output.iterdir()}
    model = finished.folder / "none.pt"
    for done in (
        answer(finished, "resume", "--run", "1"),
        answer(finished, "embed", "--esm-model", model, "--input", SOME_PROTEINS),
    ):
        assert done.error == f"database {finished.database}: {name} is not writable"
        assert done.status == 4
    assert {*finished.output.iterdir()} == folders


def test_who_may_write_a_new_database_is_decided_by_the_umask(
    script: Script, place: Place, small_model: Path
) -> None:
    before = os.umask(0o002)
    try:
        assert script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS).status == 0
    finally:
        os.umask(before)
    assert place.database.stat().st_mode & 0o777 == 0o664


def test_a_database_that_may_only_be_read_is_backed_up(
    finished: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    to = tmp_path_factory.mktemp("backup") / "copy.sqlite"
    lock_up(finished.folder)
    try:
        done = answer(finished, "backup", "--to", to)
    finally:
        unlock(finished.folder)
    assert done.status == 0, done.err
    assert [*to.parent.iterdir()] == [to]
