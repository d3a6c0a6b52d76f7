"""Write one run as a page of HTML: facts, warnings, lengths, throughput, vectors, attempts.

    python scripts/report.py --run 1
    python scripts/report.py --run 1 --to run.html

The page needs no other file and no network. Without --to it is reports/run-000001.html beside the
run database. Beside it lies run-000001_mqc.json, a row for MultiQC. They replace unaltered earlier
ones of the same run, and nothing else. An unfinished run is reported as far as it is, and a pruned
one from its record, without figures, in reports/run-000001-pruned.html. Every vector of a layer is
read once. Exit status: 0 written, 2 refused, 3 files differ from what the database
lists, 4 disk failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import (
    arguments,
    database_url,
    folder_argument,
    folder_of_run,
    run_number,
)
from lib.console.output import print_result
from lib.console.program import run_script
from lib.ledger.history import altered_rows
from lib.pages.report import default_place, make_report, write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write a report and print where it is."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="the run")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where (default: reports/)")
    folder_argument(parser)
    parsed = parser.parse_args(argv)
    url = database_url(parsed)
    now = datetime.now(UTC).isoformat()
    with altered_rows(url):
        report = make_report(url, parsed.run, now, folder_of_run(parsed))
        to = parsed.to
        if to is None:
            to = default_place(url, report)
            to.parent.mkdir(exist_ok=True)
        write_report(report, to)
    content = {
        "run": report.run,
        "status": report.status,
        "model": report.model,
        "warnings": report.warnings,
        "to": str(to),
    }
    lines = [f"run {report.run} {report.status}: report in {to}"]
    lines += [f"  {warning}" for warning in report.warnings]
    print_result(content, lines, as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
