"""Write down where the folder of a run lies now, after a look at all of its files.

    python scripts/relocate.py --run 3 --output /new/place/embeddings/run-000003
    python scripts/relocate.py --run 3 --output /new/place/embeddings

Nothing is moved: the folder lies there already, itself or within --output under its old name. Every
checkpoint file that the database lists must be there with its size and name the run in its footer.
A run with a live owner is refused. What lies below the folder of the run database is found without
this when all of it has moved. Exit status: 0 written down, 2 no such run or folder, 3 other files,
4 owned by a live process, or disk or database failed.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url, given_path, run_number
from lib.console.output import note, print_result
from lib.console.program import run_script
from lib.ledger.database import open_for_writing
from lib.ledger.relocation import relocate
from lib.units import counted


def main(argv: Sequence[str] | None = None) -> int:
    """Record the folder of one run and print what was there before."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="the run")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="its folder, or the one that it is in"
    )
    parsed = parser.parse_args(argv)
    output = given_path(parsed.output)
    assert output is not None
    with open_for_writing(database_url(parsed), create=False, say=note) as engine:
        done = relocate(engine, parsed.run, output)
    content = {"run": done.run_id, "before": str(done.before), "output_folder": str(done.folder)}
    files = counted(done.files, "checkpoint")
    line = f"run {done.run_id}: {files} in {done.folder}, before in {done.before}"
    print_result(content | {"files": done.files}, [line], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
