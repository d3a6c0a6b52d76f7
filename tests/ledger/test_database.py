"""The run database file: if this fails, history is lost, mixed up, or kept by another program."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import inspect, select

from lib.errors import MachineError, SettingsError
from lib.ledger import database
from lib.ledger.database import (
    open_for_reading,
    open_for_writing,
    transaction,
    writing_engine,
)
from schema.tables import Base, Input, SchemaVersion
from schema.version import APPLICATION_ID, SCHEMA_VERSION
from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.reference import assert_same_bits

TABLES = ["attempts", "checkpoints", "inputs", "models", "runs", "schema_version", "workers"]
VIEWS = ["checkpoint_audit", "model_usage", "record_files", "run_history", "run_progress"]
VIEWS += ["worker_throughput"]


@pytest.fixture
def fresh_db(place: Place) -> Path:
    with open_for_writing(str(place.database)):
        pass
    return place.database


def ask(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def test_tables_views_wal_and_application_id(fresh_db: Path) -> None:
    engine = open_for_reading(str(fresh_db))
    assert inspect(engine).get_table_names() == TABLES
    assert inspect(engine).get_view_names() == VIEWS
    assert ask(fresh_db, "PRAGMA journal_mode") == [("wal",)]
    assert ask(fresh_db, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert ask(fresh_db, "SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]


def test_every_column_has_a_comment_that_schema_shows(fresh_db: Path) -> None:
    for table in Base.metadata.tables.values():
        query = f"SELECT sql FROM sqlite_schema WHERE name = '{table.name}'"
        ((text,),) = ask(fresh_db, query)
        for column in table.columns:
            assert column.comment, f"{table.name}.{column.name}"
            assert f"/* {column.comment} */" in str(text)


def test_every_view_answers_on_an_empty_database(fresh_db: Path) -> None:
    for view in VIEWS:
        assert ask(fresh_db, f"SELECT * FROM {view}") == []


def test_what_is_compiled_for_a_database_serves_the_next(tmp_path: Path) -> None:
    compiled = []
    for name in ("one", "other"):
        with open_for_writing(str(tmp_path / name)) as engine, transaction(engine) as session:
            assert session.scalars(select(SchemaVersion.version)).all() == [SCHEMA_VERSION]
        compiled.append(dict(database._COMPILED))
    assert any("schema_version.version" in str(one) for one in compiled[0].values())
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_another_schema_version_is_refused_with_both(
    script: Script, place: Place, fresh_db: Path, small_model: Path, version: int
) -> None:
    with closing(sqlite3.connect(fresh_db)) as connection, connection:
        connection.execute(f"UPDATE schema_version SET version = {version}")
    before = fresh_db.read_bytes()
    for name, *flags in (
        ("embed", "--esm-model", small_model, "--input", SOME_PROTEINS),
        ("resume",),
        ("history",),
        ("query", "select 1"),
        ("validate", "--run", "1"),
    ):
        answer = script(str(name), *flags)
        assert answer.status == 2
        assert f"schema version {version}, this program's is {SCHEMA_VERSION}" in answer.error
    assert fresh_db.read_bytes() == before


def test_another_programs_database_is_refused_and_untouched(
    script: Script, place: Place, small_model: Path
) -> None:
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute("PRAGMA application_id = 17")
        connection.execute("CREATE TABLE theirs (x)")
    before = place.database.read_bytes()
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 2
    assert f"application_id 0x11 is another program's, esm-ledger's is {APPLICATION_ID:#x}" in (
        answer.error
    )
    assert place.database.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(
    script: Script, place: Place, small_model: Path
) -> None:
    place.database.write_text("not a database at all, but long enough to have a header" * 50)
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 4
    assert answer.error == f"database {place.database}: file is not a database"


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("postgresql://host/runs", "postgresql, not sqlite"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql://x", "mysql, not sqlite"),
        ("sqlite+pysqlcipher:///runs.sqlite", "sqlite+pysqlcipher, not sqlite"),
        ("sqlite://host/runs.sqlite", "host host, but SQLite has none"),
        ("://", "not a SQLAlchemy URL"),
        ("postgresql://me@host:port/runs", "not a SQLAlchemy URL"),
    ],
)
def test_only_sqlite_files_are_accepted(script: Script, url: str, fact: str) -> None:
    answer = script("history", "--database", url)
    assert answer.status == 2
    assert fact in answer.error


def test_a_sqlalchemy_url_names_the_same_file_as_a_path(script: Script, fresh_db: Path) -> None:
    assert script("history", "--database", f"sqlite:///{fresh_db}", "--json").json == []
    assert script("history", "--database", f"sqlite+pysqlite:///{fresh_db}", "--json").json == []
    assert script("history", "--database", fresh_db, "--json").json == []


def test_reading_scripts_do_not_make_a_database(script: Script, place: Place) -> None:
    for name, *flags in (("history",), ("query", "select 1"), ("resume",)):
        answer = script(name, *flags)
        assert answer.status == 2
        assert answer.error == f"database {place.database}: no such file"
    assert not place.database.exists()


def test_a_missing_folder_is_an_environment_fault(script: Script, place: Place) -> None:
    path = str(place.folder / "none" / "runs.sqlite")
    with pytest.raises(MachineError, match=r"folder .* does not exist"), open_for_writing(path):
        pass


@pytest.mark.parametrize("start", ["", "/"], ids=["", "two slashes"])
def test_odd_letters_in_the_path(place: Place, start: str) -> None:
    path = f"{start}{place.folder}/50% of ü?#'x.sqlite"
    with open_for_writing(path):
        pass
    assert Path(path).is_file()
    with transaction(open_for_reading(path)) as session:
        assert session.connection().exec_driver_sql("SELECT count(*) FROM runs").scalar() == 0


def test_readers_cannot_write(fresh_db: Path) -> None:
    engine = open_for_reading(str(fresh_db))
    with pytest.raises(MachineError, match="readonly"), transaction(engine) as session:
        session.connection().exec_driver_sql("DELETE FROM schema_version")


def test_a_transaction_is_whole_or_not_at_all(fresh_db: Path) -> None:
    with (
        open_for_writing(str(fresh_db)) as engine,
        pytest.raises(SettingsError),
        transaction(engine) as session,
    ):
        session.connection().exec_driver_sql("DELETE FROM schema_version")
        raise SettingsError("in the middle")
    assert ask(fresh_db, "SELECT count(*) FROM schema_version") == [(1,)]


# Is killed while it makes a database, with some of its pages written and none committed.
KILLED_WITHIN = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.execute("CREATE TABLE halves (text)")
for _ in range(100):
    connection.execute("INSERT INTO halves VALUES (?)", ["x" * 4000])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_database_whose_making_was_killed_is_made_again(
    script: Script, place: Place, small_model: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_WITHIN, place.database])
    assert killed.returncode == -signal.SIGKILL
    assert place.database.stat().st_size > 0
    assert Path(f"{place.database}-journal").stat().st_size > 0
    history = script("history")
    fact = "an interrupted change has not been rolled back (SQLITE_READONLY_ROLLBACK)"
    assert (history.status, history.error) == (4, f"database {place.database}: {fact}")
    embed = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert embed.status == 0, embed.err
    assert script("validate", "--run", "1").status == 0


def test_a_connection_that_nobody_has_given_back_holds_no_lock(fresh_db: Path) -> None:
    """An interrupted cell of a notebook keeps its traceback, and all that is in it."""
    with writing_engine(fresh_db) as engine:
        kept = engine.connect()
        kept.begin()
    with closing(sqlite3.connect(fresh_db, timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
    assert kept.in_transaction()


@pytest.mark.parametrize(
    "argv", [["history"], ["report", "--run", "1"], ["validate", "--run", "1"]]
)
def test_a_database_whose_first_start_was_interrupted_has_no_runs_yet(
    script: Script, place: Place, argv: list[str]
) -> None:
    place.database.touch()
    if argv[0] == "report":
        argv = [*argv, "--to", str(place.folder / "page.html")]
    answer = script(*argv)
    fact = f"database {place.database}: no runs in it yet"
    assert (answer.status, answer.error) == (2, fact)


def test_first_runs_at_the_same_instant_are_two_runs(
    place: Place, small_model: Path, script: Script
) -> None:
    flags: list[str | Path] = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(place.run, "embed", *flags, "--json") for _ in range(2)]
        answers = [start.result() for start in starts]
    assert [answer.status for answer in answers] == [0, 0], answers
    assert sorted(answer.json["run"] for answer in answers) == [1, 2]
    for run in ("1", "2"):
        assert script("validate", "--run", run).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def make_database(path: Path, gate: Path) -> None:
    """Make a database as soon as there is a file `gate`."""
    processes.pause(gate)
    with open_for_writing(str(path)):
        pass


def test_first_starts_at_the_same_instant_make_one_database(place: Place) -> None:
    gate = place.folder / "gate"
    with ExitStack() as alive:
        starts = [
            alive.enter_context(
                processes.start_function(partial(make_database, place.database, gate))
            )
            for _ in range(6)
        ]
        for start in starts:
            start.wait_for("reached")
        gate.touch()
        answers = [start.end() for start in starts]
    assert [(answer.status, answer.err) for answer in answers] == [(0, "")] * 6
    assert ask(place.database, "SELECT count(*) FROM schema_version") == [(1,)]


def test_a_database_in_whose_place_another_has_come_is_not_written_to(fresh_db: Path) -> None:
    copy = fresh_db.with_name("copy")
    with open_for_writing(str(fresh_db)) as engine:
        shutil.copy(fresh_db, copy)
        copy.replace(fresh_db)
        with (
            pytest.raises(MachineError, match="another file has taken its place"),
            transaction(engine),
        ):
            pass


def test_a_row_refers_only_to_rows_that_are_there(fresh_db: Path) -> None:
    with (
        open_for_writing(str(fresh_db)) as engine,
        pytest.raises(MachineError, match="FOREIGN KEY"),
        transaction(engine) as session,
    ):
        named = {"path": "x", "sha256": "x", "bytes": 1, "first_record": 0, "records": 1}
        session.add(Input(run_id=99, number=0, **named))
