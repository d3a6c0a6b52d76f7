"""Show the run history, newest first, or one run with its attempts and checkpoints.

    python scripts/history.py
    python scripts/history.py --run 12 --json

Opens the run database read-only. Exit status: 0 shown, 2 no such database or run.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib.console import arguments, database_url, print_fields, print_json, print_table, run_script
from lib.history import run_detail, run_history


def main(argv: Sequence[str] | None = None) -> int:
    """Print the history or one run."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=int, metavar="N", help="show this run")
    parsed = parser.parse_args(argv)
    url = database_url(parsed)
    if parsed.run is None:
        history = run_history(url)
        if parsed.json:
            print_json(history.dictionaries())
        else:
            print_table(history.columns, history.rows)
        return 0
    detail = run_detail(url, parsed.run)
    if parsed.json:
        print_json(
            detail.run.dictionaries()[0]
            | {
                "attempts": detail.attempts.dictionaries(),
                "checkpoints": detail.checkpoints.dictionaries(),
            }
        )
        return 0
    print_fields(detail.run.dictionaries()[0])
    for title, table in (("attempts", detail.attempts), ("checkpoints", detail.checkpoints)):
        print_table(table.columns, table.rows, title=title)
    return 0


if __name__ == "__main__":
    run_script(main)
