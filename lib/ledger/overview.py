"""Overview: runs, attempts and checkpoints as tables and lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lib.ledger.history import RunDetail, Table
from lib.units import count, counted, duration, moment, records, seconds_between, size

__all__ = [
    "LEAST_NEEDED",
    "SHORTENED",
    "attempts_table",
    "checkpoints_table",
    "history_table",
    "inputs_table",
    "progress_lines",
    "run_fields",
    "workers_table",
]

# Columns of history_table that are left out, in this order, until it fits the terminal. Those of
# SHORTENED are first cut to so many characters, so that fewer have to go.
LEAST_NEEDED = ["include", "layers", "reused", "took", "residues/s", "started (UTC)"]
LEAST_NEEDED += ["input", "label", "precision", "records", "input", "label"]
SHORTENED = {"input": 12, "label": 12}


def history_table(history: Table) -> Table:
    """Return a row per run: model, input, progress, speed and time taken.

    The columns `label` and `reused` are there if any of them has one, or copied records.
    """
    columns = ["run", "label", "model", "layers", "include", "precision", "status", "records"]
    columns += ["reused", "residues/s", "took", "started (UTC)", "input"]
    rows = []
    for run in history.dictionaries():
        took = seconds_between(run["started"], run["finished"])
        rate = run["residues_per_second"]
        rows.append(
            [
                run["run"],
                run["label"],
                run["model"],
                run["layers"],
                run["include"],
                run["precision"],
                run["status"],
                _of(run["records_done"], run["records_total"]),
                count(run["reused"]) if run["reused"] else None,
                None if rate is None else count(rate),
                None if took is None else duration(took),
                moment(run["started"]),
                PurePath(run["input"]).name,
            ]
        )
    return _without_empty(_without_empty(Table(columns, rows), "label"), "reused")


def run_fields(detail: RunDetail) -> dict[str, str | None]:
    """Return the facts of one run by name, in units for people and with full paths."""
    run = detail.run.dictionaries()[0]
    took = seconds_between(run["started"], run["finished"])
    rate = run["residues_per_second"]
    checkpoints = detail.checkpoints.dictionaries()
    taken = sum(row["bytes"] for row in checkpoints)
    worked = sum(row["seconds"] for row in checkpoints if row["reused_run"] is None)
    return {
        "run": str(run["run"]),
        **({} if run["label"] is None else {"label": run["label"]}),
        "status": run["status"],
        "model": run["model"],
        "released": {1: "yes", 0: "no"}.get(run["released"]),
        **({} if run["base"] is None else {"base": run["base"]}),
        "layers": run["layers"],
        "include": run["include"],
        "precision": run["precision"],
        "input": run["input"],
        "output": run["output"],
        "records": _of(run["records_done"], run["records_total"]),
        **({"reused": _sources(checkpoints)} if run["reused"] else {}),
        "residues": f"{_of(run['residues_done'], run['residues_total'])} ({run['percent']} %)",
        "records truncated": count(run["records_truncated"]),
        "letters read as X": count(run["residues_mapped"]),
        **_suspects(run),
        "residues per second": None if rate is None else count(rate),
        **({"workers": count(run["workers"])} if run["workers"] else {}),
        "on disk": size(taken) if run["pruned"] is None else f"pruned, {size(taken)} before",
        "started (UTC)": moment(run["started"]),
        "finished (UTC)": run["finished"] and moment(run["finished"]),
        **({} if run["pruned"] is None else {"pruned (UTC)": moment(run["pruned"])}),
        "took": None if took is None else duration(took),
        "computing": duration(worked),
    }


def inputs_table(detail: RunDetail) -> Table:
    """Return a row per input file: its records, size and SHA-256."""
    columns = ["input", "file", "first record", "records", "size", "sha256"]
    rows = [
        [
            one["number"],
            one["file"],
            count(one["first_record"]),
            count(one["records"]),
            size(one["bytes"]),
            one["sha256"],
        ]
        for one in detail.inputs.dictionaries()
    ]
    return Table(columns, rows)


def attempts_table(detail: RunDetail) -> Table:
    """Return a row per attempt: its outcome, time, machine, device and error."""
    columns = ["attempt", "outcome", "started (UTC)", "lasted", "host", "pid", "device"]
    columns += ["threads", "tokens per pack", "error"]
    rows = []
    for attempt in detail.attempts.dictionaries():
        lasted = seconds_between(attempt["started"], attempt["ended"] or attempt["heartbeat"])
        rows.append(
            [
                attempt["attempt"],
                attempt["outcome"],
                moment(attempt["started"]),
                None if lasted is None else duration(lasted),
                attempt["host"],
                attempt["pid"],
                f"{attempt['device']} ({attempt['device_name']})",
                attempt["threads"],
                attempt["tokens_per_pack"],
                attempt["error"],
            ]
        )
    return Table(columns, rows)


def workers_table(detail: RunDetail) -> Table:
    """Return a row per worker of a cluster: its outcome, machine, device, work and error."""
    columns = ["worker", "attempt", "outcome", "host", "pid", "device", "checkpoints", "residues"]
    columns += ["residues/s", "error"]
    rows = []
    for one in detail.workers.dictionaries():
        rate, device = one["residues_per_second"], one["device"]
        rows.append(
            [
                one["worker"],
                one["attempt"],
                one["outcome"],
                one["host"],
                one["pid"],
                None if device is None else f"{device} ({one['device_name']})",
                one["checkpoints"],
                count(one["residues"]),
                None if rate is None else count(rate),
                one["error"],
            ]
        )
    return Table(columns, rows)


def checkpoints_table(detail: RunDetail) -> Table:
    """Return a row per checkpoint: its file, content, size, time taken and problem.

    The columns `from run` and `worker` are there if any of them was copied, or computed by one.
    """
    columns = ["checkpoint", "file", "attempt", "worker", "records", "residues", "from run"]
    columns += ["size", "took", "problem"]
    rows = [
        [
            one["checkpoint"],
            one["path"],
            one["attempt"],
            one["worker"],
            count(one["records"]),
            count(one["residues"]),
            one["reused_run"],
            size(one["bytes"]),
            duration(one["seconds"]),
            one["problem"],
        ]
        for one in detail.checkpoints.dictionaries()
    ]
    return _without_empty(_without_empty(Table(columns, rows), "from run"), "worker")


def progress_lines(run: Mapping[str, Any]) -> list[str]:
    """Return the progress of a run and the time left, from what is committed, in ever fewer words.

    run: a row of `run_states`.
    """
    start = f"run {run['run']} {run['status']}: "
    done = f"{_of(run['residues_done'], run['residues_total'])} residues"
    percent, rate = f"{run['percent']} %", run["residues_per_second"]
    checkpoints = f" in {counted(run['checkpoints'], 'checkpoint')}"
    speed = "" if rate is None else f", {count(rate)} residues/s"
    left = ""
    if rate is not None and run["status"] == "running":
        left = f", {duration((run['residues_total'] - run['residues_done']) / rate)} left"
    return [
        f"{start}{done} ({percent}){checkpoints}{speed}{left}",
        f"{start}{done} ({percent}){speed}{left}",
        f"{start}{done} ({percent}){left}",
        f"{start}{done}{left}",
        f"{start}{percent}{left}",
    ]


def _without_empty(table: Table, name: str) -> Table:
    """Return a table without a column in which no row has a value."""
    place = table.columns.index(name)
    if any(row[place] is not None for row in table.rows):
        return table
    rows = [[*row[:place], *row[place + 1 :]] for row in table.rows]
    return Table([one for one in table.columns if one != name], rows)


def _suspects(run: Mapping[str, Any]) -> dict[str, str]:
    """Return how many records look like nucleotides or rows of an alignment, if any do."""
    counts = {
        "only ACGTUN": run["records_nucleotide_like"],
        "with gaps (- or .)": run["records_with_gaps"],
    }
    return {name: records(number) for name, number in counts.items() if number}


def _sources(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """Return `98,000 records of run 7, 214 of run 3`: what was copied, and from where."""
    copied: Counter[int] = Counter()
    for one in checkpoints:
        if one["reused_run"] is not None:
            copied[one["reused_run"]] += one["records"]
    (first, most), *others = copied.most_common()
    parts = [f"{records(most)} of run {first}"]
    return ", ".join([*parts, *(f"{count(number)} of run {run}" for run, number in others)])


def _of(done: int, total: int) -> str:
    return count(total) if done == total else f"{count(done)} of {count(total)}"
