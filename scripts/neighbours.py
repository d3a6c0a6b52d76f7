"""Find for each record of a query the nearest records of a run, by cosine, exactly.

    python scripts/neighbours.py --run 1 --query 2 --to nearest.csv
    python scripts/neighbours.py --run 1 --query new.fasta --to nearest.parquet
    python scripts/neighbours.py --run 1 --query 1 --neighbours 1 --to nearest.csv

The query is the number of another run, which must have been computed by the same weights, in the
same precision and with the same rule for long sequences; or a FASTA file, which is first embedded
as a run of its own by the run's very model. A record of the run itself is not its own neighbour.
Exit status: 0 written, 2 refused, 3 not comparable, 4 disk, database or memory failed, 130, 143
or 129 interrupted.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
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
from lib.console.output import note, print_result
from lib.console.program import run_script
from lib.embeddings import open_run
from lib.embeddings.neighbours import refuse_target, write_nearest
from lib.settings import load_settings
from lib.units import records
from schema.parquet import VectorColumn


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the query if it is a file, compare, and print where the neighbours are."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="where to look")
    parser.add_argument(
        "--query",
        type=_run_or_file,
        required=True,
        metavar="N|FASTA",
        help="a run, or a file to embed first",
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="a new .csv or .parquet"
    )
    parser.add_argument(
        "--neighbours", type=int, default=10, metavar="N", help="of each record (default: 10)"
    )
    parser.add_argument("--layer", type=int, help="a layer that was kept (default: the last)")
    parser.add_argument(
        "--bos", action="store_true", help="by the vectors of <cls> instead of the means"
    )
    parser.add_argument(
        "--esm-model", type=Path, metavar="PATH", help="where the run's weights lie now"
    )
    folder_argument(parser)
    parsed = parser.parse_args(argv)
    url = database_url(parsed)
    refuse_target(parsed.to, parsed.neighbours)
    targets = open_run(url, parsed.run, output=folder_of_run(parsed))
    column = targets.column("bos" if parsed.bos else "mean", parsed.layer)
    is_run = isinstance(parsed.query, int)
    query = parsed.query if is_run else embed_query(parsed, url, column)
    queries = targets if query == parsed.run else open_run(url, query)
    write_nearest(targets, queries, parsed.to, column, parsed.neighbours)
    untrained = " (untrained weights)" if targets.model["untrained"] else ""
    line = (
        f"run {parsed.run}: nearest of {records(len(targets))} by {column}, for "
        f"{records(len(queries))} of run {query}, in {parsed.to}{untrained}"
    )
    content = {
        "run": parsed.run,
        "query_run": query,
        "column": str(column),
        "queries": len(queries),
        "targets": len(targets),
        "neighbours": parsed.neighbours,
        "to": str(parsed.to),
    }
    print_result(content, [line], as_json=parsed.json)
    return 0


def embed_query(parsed: Namespace, url: str, column: VectorColumn) -> int:
    """Embed the query by the very model of the run, as a run on record; return its number."""
    # Imported here, because two runs are compared without torch.
    from lib.console.display import describe_start
    from lib.console.embedding import embed_new_run, show_input
    from lib.jobs.embedding import ThisProcess
    from lib.jobs.interruption import Interruption
    from lib.jobs.loading import know_model
    from lib.jobs.queries import query_model, query_settings
    from lib.ledger.database import open_for_writing
    from lib.ledger.runs import load_run
    from lib.ledger.standard_input import copied_standard_input
    from lib.sequences.inventory import preflight

    interruption = Interruption()
    with interruption.handled(), ExitStack() as opened:
        engine = opened.enter_context(open_for_writing(url, create=False, say=note))
        run = load_run(engine, parsed.run)
        current = load_settings(parsed.config)
        settings = query_settings(run, current, parsed.query, column, parsed.esm_model)
        detection, sha256 = query_model(run, settings, column)
        copy = copied_standard_input(settings.input, Path(settings.output.folder))
        standard_input = opened.enter_context(copy)
        inventory = preflight(settings.input, standard_input, digests=settings.output.reuse)
        show_input(inventory, settings)
        model = know_model(settings, detection, sha256)
        computer = ThisProcess(model.device, model.load)
        note(describe_start(model))
        return embed_new_run(engine, model, computer, inventory, interruption, ": the query").id


def _run_or_file(text: str) -> int | str:
    return run_number(text) if text.isdecimal() else text


if __name__ == "__main__":
    run_script(main)
