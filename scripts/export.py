"""Write a finished run in a format that other programs read.

    python scripts/export.py --run 1 --format hdf5 --to proteins.h5
    python scripts/export.py --run 1 --format hdf5 --per-residue --dtype float16 --to residues.h5
    python scripts/export.py --run 1 --format esm-extract --to folder

Formats: hdf5 (UniProt's layout), esm-extract (a .pt per record), npy (a folder with the matrix and
the ids), virnucpro (one .pt), anndata (.h5ad), csv, dataset (a folder for the Hugging Face Hub).
Every export says which run and which model its vectors come from. Records are in the order of the
FASTA. An existing file is never replaced.
Exit status: 0 written, 2 refused, 3 files differ from what the database lists, 4 disk failed.
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
from lib.embeddings.export import FORMATS, export, exported_columns
from lib.embeddings.provenance import facts_of
from lib.embeddings.selection import Selection


def main(argv: Sequence[str] | None = None) -> int:
    """Export one run and print where it is."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="the run")
    parser.add_argument("--format", choices=list(FORMATS), required=True, help="what to write")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="a new file or folder"
    )
    parser.add_argument("--layer", type=int, help="a layer that was kept (default: the last)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--bos", action="store_true", help="the vectors of <cls> instead of the means"
    )
    kind.add_argument(
        "--per-residue",
        action="store_true",
        help="hdf5, dataset: all residues instead of the means",
    )
    parser.add_argument("--dtype", choices=["float16", "float32"], help="hdf5: default as stored")
    parser.add_argument(
        "--partial", action="store_true", help="export what an unfinished run has so far"
    )
    parser.add_argument("--verify", action="store_true", help="check every file's SHA-256 first")
    folder_argument(parser)
    parsed = parser.parse_args(argv)
    wanted = "per_tok" if parsed.per_residue else "bos" if parsed.bos else "mean"
    run = open_run(
        database_url(parsed),
        parsed.run,
        partial=parsed.partial,
        verify=parsed.verify,
        output=folder_of_run(parsed),
    )
    selection = Selection(wanted, parsed.layer, parsed.dtype)
    export(run, parsed.format, parsed.to, selection)
    facts = facts_of(run, exported_columns(run, parsed.format, selection))
    untrained = " (untrained weights)" if facts["untrained"] else ""
    line = (
        f"run {parsed.run}: {len(run)} of {facts['records_total']} records, "
        f"{' '.join(facts['columns'])}, in {parsed.to} ({parsed.format}){untrained}"
    )
    content = facts | {"format": parsed.format, "to": str(parsed.to)}
    print_result(content, [line], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
