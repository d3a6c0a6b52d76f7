"""Measure embedding speed beside fair-esm, transformers, OpenVINO and esm.cpp (untrained weights).

    make benchmark
    python scripts/benchmark.py --cases 8M:orf:2000 35M:proteome:100 --repeats 3
    python scripts/benchmark.py --cases 650M:orf:40 --without transformers esm-cpp

A case is SIZE:MIX:SEQUENCES. All contenders compute the same sequences with the same weights, in
turn, each in its own process and with its own defaults; OpenVINO and esm.cpp run on a CPU only.
esm.cpp has a Python of its own, which make benchmark makes, and int8 in place of bfloat16; it is
timed giving logits, and asked for vectors afterwards. All are in memory at once: 650M with all of
them takes more than 24 GB, so --without leaves some out. Ratios are medians over the repeats,
pair by pair; the matrix-product rate of the machine (the roof) is measured beside them. A ratio is
printed only if both sides agree numerically. Start-up is the time from process start to a model
that is ready. Writes benchmarks/DATE-MACHINE.json, with a number if that exists, and a plot.
Exit status: 0 measured, 1 a side disagreed, 2 a case refused, 4 a side is missing.
"""

from __future__ import annotations

import json
import os
import platform
from argparse import ArgumentTypeError
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from benchmarks import esm_cpp
from benchmarks.measure import figures_stem, unused_stem
from benchmarks.peers import COLUMNS, PEERS, measure_case, table_rows
from benchmarks.plot import draw
from benchmarks.workload import Case
from lib.console.arguments import arguments, whole_number
from lib.console.output import print_json, print_line, print_table
from lib.console.program import run_script
from lib.network.device import choose_device, choose_pack, device_name
from lib.settings import load_settings

DEFAULT_CASES = [
    Case("8M", "orf", 1500),
    Case("35M", "proteome", 80),
    Case("150M", "proteome", 30),
    Case("650M", "orf", 40),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print one table, write the figures and the plot."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--cases", nargs="+", type=_case, default=DEFAULT_CASES, metavar="SIZE:MIX:SEQUENCES"
    )
    parser.add_argument("--repeats", type=whole_number(1, 1000), default=3)
    parser.add_argument("--without", nargs="+", default=[], choices=PEERS, metavar="PEER")
    parser.add_argument("--to", type=Path, default=Path("benchmarks"), help="folder of the figures")
    parsed = parser.parse_args(argv)
    settings = load_settings(parsed.config)
    device, _ = choose_device(settings.compute)
    date = datetime.now(UTC).date().isoformat()
    machine = f"{device_name(device)}, {os.cpu_count()} cores"
    stem = unused_stem(figures_stem(parsed.to, f"{date}-{machine}"))
    result: dict[str, Any] = {
        "date": date,
        "machine": machine,
        "weights": "untrained",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "fair-esm", "transformers", "openvino")}
        | {"esm-cpp": esm_cpp.installed_version()},
        "repeats": parsed.repeats,
        "tokens_per_pack": choose_pack(settings.compute, device)[0],
        "cases": [],
    }
    for case in parsed.cases:
        measured = measure_case(
            case, device, config=parsed.config, repeats=parsed.repeats, without=parsed.without
        )
        result["cases"].append(measured)
        # After each, as the next may not fit into memory.
        stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, stem.with_suffix(".png"))
    if parsed.json:
        print_json(result)
    else:
        print_line(f"untrained weights; {result['machine']}; {result['versions']}")
        print_table(COLUMNS, [row for case in result["cases"] for row in table_rows(case)])
    return 0 if all(one["agrees"] for case in result["cases"] for one in case["contenders"]) else 1


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    run_script(main)
