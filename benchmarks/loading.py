"""Time and peak memory of loading, beside fair-esm's own loader, in one run.

    python -m benchmarks.loading
    python -m benchmarks.loading --like esm2_t12_35M_UR50D --repeats 5 --to loading.json

Writes an untrained model in a temporary folder, then loads it in fresh processes, ours and
fair-esm's in turn; ours takes the weights' SHA-256 meanwhile, as `embed` does, or is told it, as
`resume` is once it has compared it. `ready` is from the imports being done to the model being in
memory; `peak` is the largest resident size of the whole process. The file stays in the page cache
for all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import figures_of, this_machine
from lib.catalog import RELEASED
from lib.console.output import print_json, print_line, print_table
from lib.models.untrained import make_model

_MEASURE = """
import json, sys, time
from benchmarks.processes import peak_bytes
{imports}
before = peak_bytes()
start = time.perf_counter()
{load}
ready = time.perf_counter() - start
print(json.dumps({{"ready_s": ready, "peak_bytes": peak_bytes(), "imports_bytes": before}}))
"""
_OURS = """import torch
from lib.models.detection import detect
from lib.jobs.loading import load_model
from lib.settings import load_settings
settings = load_settings(overrides={"model.esm_model": sys.argv[1], "compute.device": "cpu"})"""
LOADERS = {
    "esm-ledger, digest taken": (_OURS, "load_model(settings, detect(settings.model))"),
    "esm-ledger, digest known": (_OURS, 'load_model(settings, detect(settings.model), "0" * 64)'),
    "fair-esm": (
        "import argparse, torch, esm\ntorch.serialization.add_safe_globals([argparse.Namespace])",
        "model, alphabet = esm.pretrained.load_model_and_alphabet(sys.argv[1])",
    ),
}


def program(loader: str) -> str:
    """Return the program that loads what its argument names, and prints `measure`'s figures."""
    imports, load = LOADERS[loader]
    return _MEASURE.format(imports=imports, load=load)


def measure(loader: str, path: Path) -> dict[str, float]:
    """Load once in a process of its own; returns seconds and bytes.

    `imports_bytes` is the peak before loading.
    """
    # fair-esm runs as it ships: what lib sets for this process is not handed down.
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    return figures_of(program(loader), str(path), environment=environment)


def benchmark(like: str, repeats: int) -> dict[str, Any]:
    """Measure every loader `repeats` times, in turn; returns facts and figures."""
    shape = RELEASED[like].shape
    figures: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "esm2_untrained.pt"
        make_model(path, shape.num_layers, shape.hidden_dim, shape.attention_heads)
        for loader in LOADERS:
            measure(loader, path)  # not counted: brings the file into the page cache
        for _ in range(repeats):
            for loader, rows in figures.items():
                rows.append(measure(loader, path))
    model_bytes = 4 * shape.parameters
    fair_esm = [row["ready_s"] for row in figures["fair-esm"]]
    summary = {
        loader: {
            "ready_s": [round(row["ready_s"], 3) for row in rows],
            "ready_median_s": round(statistics.median(row["ready_s"] for row in rows), 3),
            "share_of_fair_esm": round(
                statistics.median(
                    row["ready_s"] / other for row, other in zip(rows, fair_esm, strict=True)
                ),
                3,
            ),
            "peak_gb": round(max(row["peak_bytes"] for row in rows) / 1e9, 3),
        }
        for loader, rows in figures.items()
    }
    return {
        **this_machine(),
        "weights": f"untrained, shape of {like}, float32",
        "model_gb": round(model_bytes / 1e9, 3),
        "peak_bound_gb": round((1.15 * model_bytes + 0.7e9) / 1e9, 3),
        "loaders": summary,
    }


def main() -> int:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", choices=list(RELEASED), default="esm2_t33_650M_UR50D")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parsed = parser.parse_args()
    result = benchmark(parsed.like, parsed.repeats)
    if parsed.to is not None:
        parsed.to.write_text(json.dumps(result, indent=2) + "\n")
    if parsed.json:
        print_json(result)
        return 0
    print_line(f"{result['weights']}: {result['model_gb']} GB in memory; {result['machine']}")
    columns = ["loader", "ready (median s)", "of fair-esm's", "peak (GB)"]
    rows = [
        [loader, row["ready_median_s"], row["share_of_fair_esm"], row["peak_gb"]]
        for loader, row in result["loaders"].items()
    ]
    print_table(columns, rows)
    print_line(f"bound on our peak: {result['peak_bound_gb']} GB (1.15 x the model + 0.7 GB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
