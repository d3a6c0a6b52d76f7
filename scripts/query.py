"""Ask the run database in SQL, read-only.

    python scripts/query.py "select model, sum(records_done) from run_history group by model"
    python scripts/query.py --format csv "select * from checkpoint_audit where problem not null"

Tables: models, runs, inputs, attempts, workers, checkpoints, schema_version. Views: run_history,
run_progress, record_files, checkpoint_audit, model_usage, worker_throughput. Exit status: 0
answered, 2 refused by SQLite.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url
from lib.console.output import print_json, print_table
from lib.console.program import run_script
from lib.ledger.history import query


def main(argv: Sequence[str] | None = None) -> int:
    """Run one statement and print what it gives."""
    parser = arguments(__doc__)
    parser.add_argument("sql", help="one SELECT statement")
    parser.add_argument("--format", choices=["table", "csv", "json"], default="table")
    parsed = parser.parse_args(argv)
    table = query(database_url(parsed), parsed.sql)
    rows = [[cell.hex() if isinstance(cell, bytes) else cell for cell in row] for row in table.rows]
    table = replace(table, rows=rows)  # neither JSON nor csv has bytes
    if parsed.json or parsed.format == "json":
        print_json(table.dictionaries())
    elif parsed.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([table.columns, *table.rows])
    else:
        print_table(table.columns, table.rows)
    return 0


if __name__ == "__main__":
    run_script(main)
