"""Copy the run database to a new file; a run may go on meanwhile.

    python scripts/backup.py --to runs-2026-11-24.sqlite

The copy is made with SQLite's backup API and holds what was committed when it was made. The
vectors are in the run folders: copy those as files. Exit status: 0 copied, 2 no such database or
the file exists, 4 disk or database failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url
from lib.console.output import print_result
from lib.console.program import run_script
from lib.ledger.migration import back_up


def main(argv: Sequence[str] | None = None) -> int:
    """Back up and say where the copy is."""
    parser = arguments(__doc__)
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="a new file")
    parsed = parser.parse_args(argv)
    path = back_up(database_url(parsed), parsed.to)
    content = {"database": str(path), "backup": str(parsed.to)}
    print_result(content, [f"database {path}: copied to {parsed.to}"], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
