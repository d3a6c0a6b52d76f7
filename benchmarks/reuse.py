"""Time and peak memory of a run, by the share of its input that an earlier run embedded.

    python -m benchmarks.reuse
    python -m benchmarks.reuse --records 1000000 --shares 99.9 --to reuse.json

Writes an untrained model in a temporary folder and embeds random sequences with it: the run that is
known. Then each share is measured in a process of its own, on a database that has that run only.
`finding` is the search for sources, `copying` all work before the first pack; both are part of
`whole`, which begins after the imports. `peak` is the largest resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figures_of, this_machine
from lib.console.output import note, print_json, print_line, print_table
from lib.models.untrained import make_model

_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_MEASURE = """
import json, sys, time
from benchmarks.processes import peak_bytes
import lib.jobs.computing as computing, lib.jobs.embedding as jobs, scripts.embed as script

spent = {"finding": 0.0, "copying": 0.0}
plan_reuse, copied_stretches = computing.plan_reuse, jobs.copied_stretches

def found(*arguments):
    start = time.perf_counter()
    plan = plan_reuse(*arguments)
    spent["finding"] += time.perf_counter() - start
    return plan

def copied(copying):
    start = time.perf_counter()
    yield from copied_stretches(copying)
    spent["copying"] += time.perf_counter() - start

computing.plan_reuse, jobs.copied_stretches = found, copied
start, processor = time.perf_counter(), time.process_time()
if status := script.main(sys.argv[1:]):
    sys.exit(status)
spent |= {"whole": time.perf_counter() - start, "processor": time.process_time() - processor}
print(json.dumps({"peak": peak_bytes(), **spent}))
"""


def make_workplace(folder: Path, layers: int, width: int) -> None:
    """Make an untrained model in a folder, and a config.ini that keeps all else there."""
    make_model(folder / "model.pt", layers, width, width // 16)
    config = "[model]\nesm_model = model.pt\n[output]\nfolder = embeddings\n"
    (folder / "config.ini").write_text(f"{config}[database]\nurl = runs.sqlite\n")


def write_records(path: Path, first: int, records: int, residues: int) -> None:
    """Append random sequences of `residues` on average; `first` numbers them and seeds them."""
    chance = random.Random(first)
    with path.open("a", encoding="ascii") as file:
        for number in range(first, first + records):
            length = max(10, round(chance.gauss(residues, residues / 4)))
            letters = "".join(chance.choices(_LETTERS, k=length))
            file.write(f">tr|R{number:09d}|R{number:09d}_RANDOM a random protein\n{letters}\n")


def embed(folder: Path, fasta: Path, *flags: str) -> dict[str, float]:
    """Embed a FASTA file in a process of its own; return seconds and bytes."""
    argv = ["--config", str(folder / "config.ini"), "--input", str(fasta), *flags]
    return figures_of(_MEASURE, *argv)


def shares(
    folder: Path, records: int, residues: int, known: list[float], repeats: int
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each share of known records."""
    fasta, database = folder / "known.fasta", folder / "runs.sqlite"
    write_records(fasta, 0, records, residues)
    note(f"embedding {records} records, to be known")
    embed(folder, fasta)
    kept = shutil.copy(database, folder / "kept.sqlite")
    for share in known:
        part = folder / "part.fasta"
        part.unlink(missing_ok=True)
        there = round(records * share / 100)
        write_records(part, 0, there, residues)
        write_records(part, records, records - there, residues)
        rows = []
        for _ in range(repeats):
            for beside in ("-wal", "-shm"):
                Path(f"{database}{beside}").unlink(missing_ok=True)
            shutil.copy(kept, database)
            rows.append(embed(folder, part))
            shutil.rmtree(folder / "embeddings" / "run-000002")
        yield {
            "share": share,
            **{key: [round(row[key], 3) for row in rows] for key in rows[0]},
        }


def benchmark(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure every share; returns facts and figures."""
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        make_workplace(folder, parsed.layers, parsed.width)
        figures = list(
            shares(folder, parsed.records, parsed.residues, parsed.shares, parsed.repeats)
        )
    return {
        **this_machine(),
        "records": parsed.records,
        "residues": parsed.residues,
        "weights": f"untrained, {parsed.layers} layers, {parsed.width} wide",
        "shares": figures,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=4000, help="of the run that is known")
    parser.add_argument("--residues", type=int, default=100, help="of a record, on average")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 50, 90, 99, 100])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parsed = parser.parse_args(argv)
    result = benchmark(parsed)
    if parsed.to is not None:
        parsed.to.write_text(json.dumps(result, indent=2) + "\n")
    if parsed.json:
        print_json(result)
        return 0
    print_line(f"{result['records']} records known; {result['weights']}; {result['machine']}")
    columns = ["known (%)", "whole (s)", "finding (s)", "copying (s)", "processor (s)", "peak (GB)"]
    rows = [
        [
            row["share"],
            *(statistics.median(row[key]) for key in ("whole", "finding", "copying", "processor")),
            round(max(row["peak"]) / 1e9, 3),
        ]
        for row in result["shares"]
    ]
    print_table(columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
