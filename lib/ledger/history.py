"""History: runs read from the run database, read-only and without torch."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import MachineError, SettingsError
from lib.ledger.ownership import shown_status
from lib.ledger.places import StoredRun, shown_path
from lib.ledger.sqlite_file import (
    connect_read_only,
    database_path,
    raise_ctrl_c,
    refuse_empty,
    sqlite_errors,
)

__all__ = [
    "RunDetail",
    "Table",
    "altered_rows",
    "query",
    "refuse_pruned",
    "run_detail",
    "run_folders",
    "run_history",
    "run_states",
    "watch",
]


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    columns: list[str]
    rows: Sequence[Sequence[Any]]

    def dictionaries(self) -> list[dict[str, Any]]:
        """Return one dictionary per row; raises SettingsError if two columns have one name."""
        for column, count in Counter(self.columns).items():
            if count > 1:
                raise SettingsError(f"SQL: {count} columns are named {column}")
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class RunDetail:
    """One run: its row in the history, its inputs, attempts, workers and checkpoints."""

    run: Table
    inputs: Table
    attempts: Table
    checkpoints: Table
    workers: Table


@contextmanager
def altered_rows(url: str) -> Iterator[None]:
    """Turn the errors that rows with wrong types or names cause into a MachineError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fact = f"malformed rows: {type(error).__name__}: {error}"
        raise MachineError(f"database {database_path(url)}: {fact}") from None


def query(url: str, statement: str, parameters: Sequence[object] = ()) -> Table:
    """Run one SQL statement read-only; raises SettingsError if SQLite refuses it."""
    path = database_path(url)
    with sqlite_errors(path), closing(connect_read_only(path)) as connection:
        try:
            cursor = connection.execute(statement, parameters)
            columns = [column[0] for column in cursor.description or []]
            return Table(columns, cursor.fetchall())
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise_ctrl_c(error)
            refuse_empty(path)
            raise SettingsError(f"SQL: {error}") from None


def run_history(url: str) -> Table:
    """Return run_history, newest first; a running run without a live process shows as `killed`."""
    return _as_it_is(url, "SELECT * FROM run_history")


def run_detail(url: str, run_id: int) -> RunDetail:
    """Return one run; raises SettingsError if the database has no such run."""
    line = _as_it_is(
        url,
        "SELECT run_history.*, residues_done, runs.residues_total, "
        "records_truncated, residues_mapped, records_nucleotide_like, records_with_gaps, percent "
        "FROM run_history JOIN runs ON id = run_history.run "
        "JOIN run_progress ON run_progress.run = id WHERE id = ?",
        [run_id],
    )
    if not line.rows:
        raise SettingsError(f"run {run_id}: not in database {database_path(url)}")
    inputs = query(
        url,
        "SELECT number, file, first_record, last_record, records, bytes, sha256 "
        "FROM record_files WHERE run = ? ORDER BY number",
        [run_id],
    )
    attempts = query(
        url,
        "SELECT id AS attempt, outcome, started_at AS started, heartbeat_at AS heartbeat, "
        "ended_at AS ended, host, pid, device, device_name, threads, tokens_per_pack, "
        "weights_path, error FROM attempts WHERE run_id = ? ORDER BY id",
        [run_id],
    )
    checkpoints = query(
        url,
        "SELECT checkpoint_audit.checkpoint, path, attempt_id AS attempt, "
        "checkpoints.records, residues, reused_run, checkpoints.bytes, seconds, "
        "committed_at AS committed, problem, worker_id AS worker "
        "FROM checkpoints JOIN checkpoint_audit "
        "ON checkpoint_audit.checkpoint = checkpoints.id WHERE run_id = ? ORDER BY first_position",
        [run_id],
    )
    workers = query(url, "SELECT * FROM worker_throughput WHERE run = ? ORDER BY worker", [run_id])
    inputs, attempts = _shown(url, inputs, "file"), _shown(url, attempts, "weights_path")
    return RunDetail(line, inputs, attempts, checkpoints, workers)


def run_states(url: str) -> Table:
    """Return the progress and the status of each run, newest first."""
    return _as_it_is(
        url,
        "SELECT run_progress.*, residues_per_second, output "
        "FROM run_progress JOIN run_history USING (run) ORDER BY run DESC",
    )


def run_folders(url: str) -> dict[int, Path]:
    """Return the folder of each run, where it lies now."""
    # Only what is stored absolute may have moved along with the database.
    rows = query(
        url,
        "SELECT id, uuid, output_folder, "
        "CASE WHEN output_folder NOT GLOB './*' THEN settings END AS settings FROM runs",
    ).dictionaries()
    path = database_path(url)
    with altered_rows(url):
        return {row["id"]: StoredRun.of_row(row).folder(path) for row in rows}


def refuse_pruned(run_id: int, pruned_at: str | None) -> None:
    """Raise SettingsError if the files of a run have been taken off the disk."""
    if pruned_at is not None:
        raise SettingsError(f"run {run_id}: its files were pruned at {pruned_at}")


def watch(
    url: str, run_id: int | None, seconds: float, stopped_within: Callable[[float], bool]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the states of running runs every `seconds` until none is running.

    Watches one run, or all that run at the start. The last states are those in which the runs
    ended, or the last before `stopped_within`, which waits so many seconds, returned True. Raises
    SettingsError if the run does not exist.
    """
    states = run_states(url).dictionaries()
    watched = {row["run"] for row in states if row["status"] == "running"}
    if run_id is not None:
        watched = {row["run"] for row in states if row["run"] == run_id}
        if not watched:
            raise SettingsError(f"run {run_id}: not in database {database_path(url)}")
    while True:
        shown = [row for row in states if row["run"] in watched]
        yield shown
        if not any(row["status"] == "running" for row in shown):
            return
        if stopped_within(seconds):
            return
        states = run_states(url).dictionaries()


def _as_it_is(url: str, statement: str, parameters: Sequence[object] = ()) -> Table:
    """Return rows of runs with their folders where these lie now, and with `killed` as a status."""
    # The lock is looked at right after the status: a run that ends in between would look killed.
    folders, history = run_folders(url), query(url, statement, parameters)
    columns = history.columns
    run, status, folder = map(columns.index, ("run", "status", "output"))
    if any(row[run] not in folders for row in history.rows):  # begun in between
        folders = run_folders(url)
    rows = []
    for row in history.rows:
        shown = list(row)
        shown[folder] = str(folders[row[run]])
        shown[status] = shown_status(row[status], folders[row[run]])
        rows.append(shown)
    table = Table(columns, rows)
    return _shown(url, table, "input") if "input" in columns else table


def _shown(url: str, table: Table, name: str) -> Table:
    """Return a table with the stored paths of a column as people read them."""
    place, database = table.columns.index(name), database_path(url)
    rows = [list(row) for row in table.rows]
    for row in rows:
        if isinstance(row[place], str):
            row[place] = shown_path(row[place], database)
    return Table(table.columns, rows)
