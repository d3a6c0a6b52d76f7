"""Show the run history, newest first, or one run with its attempts and checkpoints.

    python scripts/history.py
    python scripts/history.py --run 12 --json
    python scripts/history.py --watch

On a terminal, columns that do not fit are left out, and long labels and names of inputs shortened;
--json prints all of them, as plain numbers.
--watch shows the progress of running runs until they end, or until Ctrl-C. The run database is
opened read-only. Exit status: 0 shown, 2 no such database or run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url, run_number
from lib.console.output import LiveLines, print_fields, print_json, print_table
from lib.console.program import ctrl_c_within, run_script
from lib.ledger.history import altered_rows, run_detail, run_history, watch
from lib.ledger.overview import (
    LEAST_NEEDED,
    SHORTENED,
    attempts_table,
    checkpoints_table,
    history_table,
    inputs_table,
    progress_lines,
    run_fields,
    workers_table,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the history or one run."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, metavar="N", help="show this run")
    parser.add_argument("--watch", action="store_true", help="follow the running runs")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="how often --watch looks"
    )
    parsed = parser.parse_args(argv)
    url = database_url(parsed)
    with altered_rows(url):
        if parsed.watch:
            show_progress(url, parsed.run, parsed.every, as_json=parsed.json)
        elif parsed.run is None:
            show_history(url, as_json=parsed.json)
        else:
            show_run(url, parsed.run, as_json=parsed.json)
    return 0


def show_progress(url: str, run_id: int | None, seconds: float, *, as_json: bool) -> None:
    """Follow runs until they end; Ctrl-C also ends with status 0."""
    lines = LiveLines()
    with ctrl_c_within() as stopped_within:
        for states in watch(url, run_id, seconds, stopped_within):
            if as_json:
                print_json(states)
            else:
                lines.show([progress_lines(state) for state in states] or [["no run is running"]])


def show_history(url: str, *, as_json: bool) -> None:
    """Print a line per run."""
    history = run_history(url)
    if as_json:
        print_json(history.dictionaries())
        return
    table = history_table(history)
    print_table(table.columns, table.rows, least_needed=LEAST_NEEDED, shortened=SHORTENED)


def show_run(url: str, run_id: int, *, as_json: bool) -> None:
    """Print one run, its input files if there are several, its attempts and its checkpoints."""
    detail = run_detail(url, run_id)
    if as_json:
        print_json(
            detail.run.dictionaries()[0]
            | {
                "inputs": detail.inputs.dictionaries(),
                "attempts": detail.attempts.dictionaries(),
                "workers": detail.workers.dictionaries(),
                "checkpoints": detail.checkpoints.dictionaries(),
            }
        )
        return
    print_fields(run_fields(detail))
    inputs = inputs_table(detail)
    if len(inputs.rows) > 1:
        print_table(inputs.columns, inputs.rows, title="inputs", least_needed=["sha256", "size"])
    attempts, checkpoints = attempts_table(detail), checkpoints_table(detail)
    unneeded = ["pid", "tokens per pack", "threads", "host"]
    print_table(attempts.columns, attempts.rows, title="attempts", least_needed=unneeded)
    if detail.workers.rows:
        workers = workers_table(detail)
        unneeded = ["pid", "residues", "checkpoints"]
        print_table(workers.columns, workers.rows, title="workers", least_needed=unneeded)
    print_table(
        checkpoints.columns, checkpoints.rows, title="checkpoints", least_needed=["residues"]
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: not from 0.1 to 3600")
    return value


if __name__ == "__main__":
    run_script(main)
