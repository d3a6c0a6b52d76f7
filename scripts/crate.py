"""Write a finished run with its provenance as a Process Run Crate (RO-Crate).

    python scripts/crate.py --run 1 --to crate
    python scripts/crate.py --run 1 --to crate --license https://creativecommons.org/licenses/by/4.0/

The crate is a new folder with a copy of every checkpoint file and ro-crate-metadata.json, which
describes every attempt at the run: the program, the input, the weights, the settings and the files
that it made. Exit status: 0 written, 2 refused, 3 files differ from what the database lists, 4 disk
failed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from lib.embeddings import open_run
from lib.embeddings.crate import NO_LICENSE, write_crate
from lib.units import counted


def main(argv: Sequence[str] | None = None) -> int:
    """Write the crate of one run and print where it is."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="the run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--license",
        default=NO_LICENSE,
        metavar="URL",
        help=f"of the vectors (default: {NO_LICENSE})",
    )
    folder_argument(parser)
    parsed = parser.parse_args(argv)
    url = database_url(parsed)
    run = open_run(url, parsed.run, output=folder_of_run(parsed))
    write_crate(url, run, parsed.to, parsed.license)
    files = len(run.files)
    content = {"run": parsed.run, "run_uuid": run.facts["uuid"], "files": files}
    content |= {"license": parsed.license, "to": str(parsed.to)}
    line = f"run {parsed.run}: crate of {counted(files, 'checkpoint')} in {parsed.to}"
    print_result(content, [line], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
