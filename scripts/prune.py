"""Take the files of runs off the disk and keep their history, as status pruned.

    python scripts/prune.py --run 3 --dry-run
    python scripts/prune.py --run 3
    python scripts/prune.py --run 3 --output /new/place/embeddings
    python scripts/prune.py --older-than 90d --dry-run

--older-than takes every run that no process has worked on for so many hours (12h), days (90d) or
weeks (2w). A run with a live owner is refused. What goes are the checkpoint files that the database
lists, the reuse plan, the copy of standard input and temporary files; whatever else lies in the
folder stays and is named. A pruning that was cut short can be run again. A run whose folder is not
there may be on a disk that is not mounted: --older-than passes it over and names it, and --run
refuses it if the folder around it is missing, too. --output says where its folder lies now, if not
where the record says. Exit status: 0 done, 2 no such run or folder, 3 malformed rows or the folder
of another run, 4 owned by a live process, or disk or database failed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import timedelta

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import (
    arguments,
    database_url,
    folder_argument,
    folder_of_run,
    run_number,
)
from lib.console.output import note, print_json, print_line
from lib.console.program import run_script
from lib.errors import SettingsError
from lib.ledger.pruning import prunings


def main(argv: Sequence[str] | None = None) -> int:
    """Prune one run or all that are old, and print what went and what stayed."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, metavar="N", help="the run")
    parser.add_argument(
        "--older-than", type=_age, metavar="AGE", help="every run that was idle for so long: 90d"
    )
    folder_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would go; change nothing")
    parsed = parser.parse_args(argv)
    if (parsed.run is None) == (parsed.older_than is None):
        raise SettingsError("--run or --older-than: one of them is needed, and not both")
    output = folder_of_run(parsed)
    if parsed.run is None and output is not None:
        raise SettingsError("--output: only with --run")
    wanted = parsed.older_than if parsed.run is None else parsed.run
    url, done = database_url(parsed), []
    for pruning in prunings(url, wanted, output, dry_run=parsed.dry_run, say=note):
        done.append(pruning.json())
        if not parsed.json:
            print_line("\n".join(pruning.describe(dry_run=parsed.dry_run)))
    if parsed.json:
        print_json(done)
    elif not done:
        print_line("no run that old has files")
    return 0


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,4})([hdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: not hours (12h), days (90d) or weeks (2w)")
    unit = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[match[2]]
    return int(match[1]) * unit


if __name__ == "__main__":
    run_script(main)
