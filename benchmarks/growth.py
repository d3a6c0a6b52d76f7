"""Records per second and peak memory of a run, by how many records its input has.

    python -m benchmarks.growth
    python -m benchmarks.growth --records 10000 100000 1000000 --to growth.json

Embeds random sequences with a small untrained model, each input in a process of its own with a
database of its own. `records/s` is over the whole run, without imports; `work` without what comes
before the first pack: reading the FASTA file, checking it and looking for sources.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figures_of, this_machine
from benchmarks.reuse import make_workplace, write_records
from lib.console.output import note, print_line, print_table

_MEASURE = """
import json, sys, time
from benchmarks.processes import peak_bytes
import lib.console.embedding as embedding, scripts.embed as script

true, begun = embedding.work, []

def work(job):
    begun.append(time.perf_counter())
    return true(job)

embedding.work = work
start = time.perf_counter()
if status := script.main(sys.argv[1:]):
    sys.exit(status)
end = time.perf_counter()
figures = {"whole_s": end - start, "work_s": end - begun[0], "peak_bytes": peak_bytes()}
print(json.dumps(figures))
"""


def benchmark(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measure every input; returns facts and figures."""
    rows = []
    for records in parsed.records:
        with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
            config, fasta = Path(name, "config.ini"), Path(name, "in.fasta")
            make_workplace(Path(name), parsed.layers, parsed.width)
            write_records(fasta, 0, records, parsed.residues)
            note(f"embedding {records} records")
            argv = ["--config", str(config), "--input", str(fasta)]
            rows.append({"records": records, **figures_of(_MEASURE, *argv)})
    return {
        **this_machine(),
        "residues": parsed.residues,
        "weights": f"untrained, {parsed.layers} layers, {parsed.width} wide",
        "inputs": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = [10_000, 100_000, 1_000_000]
    parser.add_argument("--records", type=int, nargs="+", default=counts)
    parser.add_argument("--residues", type=int, default=100, help="of a record, on average")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where temporary folders are made")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the figures as JSON")
    parsed = parser.parse_args(argv)
    result = benchmark(parsed)
    if parsed.to is not None:
        parsed.to.write_text(json.dumps(result, indent=2) + "\n")
    print_line(f"{result['weights']}; {result['machine']}")
    columns = ["records", "records/s", "work, records/s", "peak (GB)"]
    print_table(
        columns,
        [
            [
                row["records"],
                round(row["records"] / row["whole_s"]),
                round(row["records"] / row["work_s"]),
                round(row["peak_bytes"] / 1e9, 3),
            ]
            for row in result["inputs"]
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
