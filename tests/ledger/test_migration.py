"""Upgrade and backup: if these fail, an older run database is lost, or a copy of one is not whole.

tests/data/version_1 was made by version 0.1.0 (commit 4c02d44): a finished run, an interrupted one,
and one without model metadata, with an untrained model of two layers.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection

from lib.ledger import migration
from lib.ledger.database import open_for_writing
from schema.migrations.versions import v2
from schema.version import SCHEMA_VERSION
from tests import processes
from tests.conftest import DATA, WHOLE_PROTEINS, Place, Script
from tests.reference import read_run, worst_residue_error

VERSION_1 = DATA / "version_1"
# Its columns keep the comments that they had: its rows are absolute.
ABSOLUTE_IN_VERSION_1 = ("runs.input_path", "runs.output_folder", "attempts.weights_path")


@pytest.fixture
def old(place: Place) -> Place:
    """Put the version-1 database in its place, with its files."""
    shutil.copytree(VERSION_1, place.folder, dirs_exist_ok=True)
    with closing(sqlite3.connect(place.database)) as connection, connection:
        # Paths were absolute on another machine.
        connection.execute(
            "UPDATE runs SET output_folder = replace(output_folder, '/tmp/v1', ?)",
            [str(place.folder)],
        )
    return place


def ask(path: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def here(place: Place) -> list[str | Path]:
    return ["--esm-model", place.folder / "esm2_tiny.pt", "--input", WHOLE_PROTEINS]


def test_an_older_database_is_refused_with_the_command_that_helps(
    script: Script, old: Place
) -> None:
    before = old.database.read_bytes()
    for name, *flags in (
        ("history",),
        ("resume",),
        ("validate", "--run", "1"),
        ("query", "select 1"),
    ):
        answer = script(name, *flags)
        assert answer.status == 2
        assert answer.error == (
            f"database {old.database}: schema version 1, this program's is {SCHEMA_VERSION} "
            "(make upgrade)"
        )
    assert old.database.read_bytes() == before


def test_an_upgraded_database_continues_its_runs(script: Script, old: Place) -> None:
    before = old.database.read_bytes()
    files = {path: path.read_bytes() for path in old.output.rglob("*.parquet")}
    answer = script("upgrade")
    assert answer.status == 0, answer.err
    backup = old.folder / "runs.sqlite.version-1"
    assert answer.out == (
        f"database {old.database}: schema version 1 brought to {SCHEMA_VERSION}, "
        f"backup in {backup}\n"
    )
    assert ask(backup, "SELECT max(version) FROM schema_version") == [(1,)]
    assert ask(backup, "SELECT * FROM runs") == ask_bytes(old.folder, before, "SELECT * FROM runs")
    assert "already" in script("upgrade").out
    assert script("validate", "--run", "1", *here(old)).status == 0
    resumed = script("resume", "--run", "2", *here(old))
    assert resumed.status == 0, resumed.err
    finished = read_run(old.output / "run-000002")
    whole = read_run(old.output / "run-000001")
    assert sorted(finished) == sorted(whole) == list(range(15))
    # A run goes on with the columns that it began with.
    assert not any("embedded_sha256" in row for row in finished.values())
    assert files == {path: path.read_bytes() for path in files}
    assert len([*(old.output / "run-000002").glob("*.parquet")]) > 2
    for record, row in whole.items():
        # Another processor rounds in another order.
        found, truth = (np.asarray(one["mean_2"])[None] for one in (finished[record], row))
        assert worst_residue_error(found, truth) <= 1e-5
    assert script("validate", "--run", "2", *here(old)).status == 0


def ask_bytes(folder: Path, content: bytes, statement: str) -> list[tuple[object, ...]]:
    path = folder / "as-it-was.sqlite"
    path.write_bytes(content)
    return ask(path, statement)


def test_an_upgrade_invents_no_metadata(script: Script, old: Place) -> None:
    assert script("upgrade").status == 0
    assert ask(old.database, "SELECT esm2_config, model_id FROM runs WHERE id = 3") == [
        (None, None)
    ]
    answer = script("resume", "--run", "3", *here(old))
    assert answer.status == 3
    assert answer.error == "run 3: no model metadata (NULL)"
    assert ask(old.database, "SELECT released, base_name, base_sha256 FROM models") == [
        (0, None, None)
    ]


def test_a_released_file_is_proven_by_the_digest_on_record(script: Script, old: Place) -> None:
    with closing(sqlite3.connect(old.database)) as connection, connection:
        connection.execute("UPDATE models SET sha256 = ?", [v2._RELEASED[3]])
    assert script("upgrade").status == 0
    assert ask(old.database, "SELECT released FROM models") == [(1,)]


def test_an_upgraded_database_has_the_tables_and_views_of_a_new_one(
    script: Script, old: Place
) -> None:
    assert script("upgrade").status == 0
    new = old.folder / "new.sqlite"
    with open_for_writing(str(new)):
        pass
    statement = "SELECT name, sql FROM sqlite_schema WHERE type IN ('table', 'view') ORDER BY name"
    for (name, sql), (expected_name, expected) in zip(
        ask(old.database, statement), ask(new, statement), strict=True
    ):
        assert name == expected_name
        if str(expected).startswith("CREATE VIEW"):
            assert sql == expected
    columns = "SELECT * FROM pragma_table_info('{}') ORDER BY name"
    for (name,) in ask(new, "SELECT name FROM sqlite_schema WHERE type = 'table'"):
        found = [row[1:] for row in ask(old.database, columns.format(name))]
        assert found == [row[1:] for row in ask(new, columns.format(name))], name
        if name != "schema_version":  # whose comments say more since there can be two rows
            comments = {
                column: comment
                for column, comment in comments_of(new, str(name)).items()
                if f"{name}.{column}" not in ABSOLUTE_IN_VERSION_1
            }
            assert comments_of(old.database, str(name)).items() >= comments.items(), name
    assert ask(old.database, "PRAGMA foreign_key_check") == []


def test_a_database_of_the_version_before_gets_what_is_new(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", WHOLE_PROTEINS]
    assert script("embed", *flags).status == 0
    with closing(sqlite3.connect(place.database)) as connection, connection:
        for (view,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'view'"):
            connection.execute(f"DROP VIEW {view}")
        for name in ("label", "records_nucleotide_like", "records_with_gaps"):
            connection.execute(f"ALTER TABLE runs DROP COLUMN {name}")
        connection.execute("UPDATE schema_version SET version = 2")
    assert "schema version 2" in script("history").error
    assert script("upgrade").status == 0
    (run,) = script("history", "--json").json
    assert (run["run"], run["label"], run["status"]) == (1, None, "finished")
    assert "only ACGTUN" not in script("history", "--run", "1").out
    assert script("resume", "--run", "1", *flags).status == 0
    assert script("embed", *flags, "--label", "second").status == 0
    assert [one["label"] for one in script("history", "--json").json] == ["second", None]


def comments_of(path: Path, table: str) -> dict[str, str]:
    ((sql,),) = ask(path, f"SELECT sql FROM sqlite_schema WHERE name = '{table}'")
    return dict(re.findall(r"[\t,] ?(\w+) [A-Z][^/]*/\* (.*?) \*/", str(sql)))


def test_an_upgrade_that_is_killed_changes_nothing(script: Script, old: Place) -> None:
    before = ask(old.database, "SELECT name, sql FROM sqlite_schema")
    killed = processes.run("upgrade", "--config", old.config, prepare=_die_before_the_views)
    assert killed.status == -9
    assert script("history").error.endswith("(make upgrade)")
    assert (old.folder / "runs.sqlite.version-1").exists()
    assert ask(old.database, "SELECT name, sql FROM sqlite_schema") == before
    assert script("upgrade").status == 0
    assert script("history").status == 0


def _die_before_the_views() -> None:
    processes.at_call("lib.ledger.migration.make_views", 1, processes.die)


def has_a_table_of_ours(_connection: Connection) -> None:
    """Leave it to the statement that makes the table of that name."""


def is_full(connection: Connection) -> None:
    (pages,) = connection.exec_driver_sql("PRAGMA page_count").one()
    connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def is_interrupted(_connection: Connection) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("trouble", "status", "fact"),
    [
        (has_a_table_of_ours, 4, "database {}: table inputs already exists"),
        (is_full, 4, "database {}: database or disk is full"),
        (is_interrupted, 130, "SIGINT: interrupted"),
    ],
)
def test_an_upgrade_that_fails_is_one_line_and_can_be_tried_again(
    script: Script,
    old: Place,
    trouble: Callable[[Connection], None],
    status: int,
    fact: str,
) -> None:
    """Before, it was a traceback, and the backup that was left refused every other try."""
    if trouble is has_a_table_of_ours:
        ask(old.database, "CREATE TABLE inputs (theirs)")
    before = ask(old.database, "SELECT name, sql FROM sqlite_schema")
    true_migrate = migration._migrate

    def migrate(connection: Connection, version: int) -> None:
        trouble(connection)
        true_migrate(connection, version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "_migrate", migrate)
        answer = script("upgrade")
    assert (answer.status, answer.error) == (status, fact.format(old.database))
    assert ask(old.database, "SELECT name, sql FROM sqlite_schema") == before
    assert not (old.folder / "runs.sqlite.version-1").exists()
    ask(old.database, "DROP TABLE IF EXISTS inputs")
    assert script("upgrade").status == 0
    assert script("history").status == 0


def test_an_upgrade_waits_for_a_lock_in_bounded_time(
    script: Script, old: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.ledger.database.BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(old.database)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        answer = script("upgrade")
    assert (answer.status, answer.error) == (4, f"database {old.database}: database is locked")
    assert script("upgrade").status == 0


def test_an_upgrade_replaces_no_backup_of_other_content(script: Script, old: Place) -> None:
    backup = old.folder / "runs.sqlite.version-1"
    shutil.copy(old.database, backup)
    ask(old.database, "CREATE TABLE written_since (x)")
    for _ in range(2):  # the first try leaves it, too
        answer = script("upgrade")
        assert (answer.status, answer.error) == (2, f"{backup}: exists already")
    assert ask(backup, "SELECT max(version) FROM schema_version") == [(1,)]


def test_an_upgrade_keeps_the_views_of_the_user(script: Script, old: Place) -> None:
    ask(old.database, "CREATE VIEW my_runs AS SELECT run, records_done FROM run_history")
    before = ask(old.database, "SELECT * FROM my_runs")
    assert before
    assert script("upgrade").status == 0
    assert ask(old.database, "SELECT * FROM my_runs") == before


def test_a_newer_or_foreign_database_is_not_upgraded(script: Script, place: Place) -> None:
    with open_for_writing(str(place.database)):
        pass
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute(f"UPDATE schema_version SET version = {SCHEMA_VERSION + 1}")
    answer = script("upgrade")
    assert answer.status == 2
    assert answer.error.endswith(
        f"schema version {SCHEMA_VERSION + 1}, this program's is {SCHEMA_VERSION}"
    )
    place.database.unlink()
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute("CREATE TABLE theirs (x)")
    assert "another program's" in script("upgrade").error
    place.database.unlink()
    assert script("upgrade").error == f"database {place.database}: no such file"


def test_a_backup_is_whole_while_a_run_goes_on(
    script: Script, place: Place, small_model: Path
) -> None:
    gate, to = place.folder / "gate", place.folder / "copy.sqlite"
    flags: list[object] = ["--esm-model", small_model, "--input", WHOLE_PROTEINS]
    flags += ["--config", place.config, "--set", "output.checkpoint_records=3"]
    flags += ["--set", "compute.tokens_per_pack=900"]

    with processes.start("embed", *flags, prepare=Pause(gate)) as run:
        run.wait_for("reached")
        assert script("backup", "--to", to).status == 0
        assert script("backup", "--to", to).error == f"{to}: exists already"
        gate.touch()
        assert run.end().status == 0
    assert ask(to, "SELECT count(*) FROM checkpoints") == [(2,)]
    assert ask(to, "PRAGMA integrity_check") == [("ok",)]
    assert ask(to, "PRAGMA journal_mode") == [("delete",)]


class Pause:
    """Pauses embed.py at its third commit."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __call__(self) -> None:
        processes.stop_at("lib.ledger.commit.add_checkpoint", 3, self.gate)


def test_after_a_kill_the_one_file_has_everything_that_was_committed(
    place: Place, small_model: Path
) -> None:
    flags: list[object] = ["--esm-model", small_model, "--input", WHOLE_PROTEINS]
    flags += ["--config", place.config, "--set", "output.checkpoint_records=3"]
    flags += ["--set", "compute.tokens_per_pack=900"]
    assert processes.run("embed", *flags, prepare=_die_after_two).status == -9
    alone = place.folder / "alone" / "runs.sqlite"
    alone.parent.mkdir()
    shutil.copy(place.database, alone)
    assert ask(alone, "SELECT count(*) FROM checkpoints") == [(2,)]
    assert ask(alone, "SELECT status FROM runs") == [("running",)]
    assert ask(alone, "PRAGMA integrity_check") == [("ok",)]


def _die_after_two() -> None:
    processes.at_call("lib.ledger.commit.add_checkpoint", 2, processes.die, after=True)
