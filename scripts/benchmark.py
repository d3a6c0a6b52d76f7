"""Measure embedding speed beside fair-esm, transformers, OpenVINO and esm.cpp (untrained weights).

    make benchmark
    python scripts/benchmark.py --cases 8M:orf:2000 35M:proteome:100 --repeats 3
    python scripts/benchmark.py --cases 650M:orf:40 --without openvino esm-cpp

A case is SIZE:MIX:SEQUENCES. All contenders compute the same sequences with the same weights, in
turn, each in its own process and with its own defaults; OpenVINO and esm.cpp run on a CPU only.
esm.cpp has a Python of its own, which make benchmark makes, and int8 in place of bfloat16; it is
timed giving logits, and asked for vectors afterwards. All are in memory at once: 650M with all of
them takes more than 24 GB. Ratios are medians over the repeats,
pair by pair; the matrix-product rate of the machine (the roof) is measured beside them. A ratio is
printed only if both sides agree numerically. Start-up is the time from process start to a model
that is ready. Writes benchmarks/DATE-MACHINE.json and a plot. Exit status: 0 measured, 1 a side
disagreed, 4 a side is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

import torch

from benchmarks import esm_cpp
from benchmarks.measure import AGREES, agreement, end_to_end_share, figures_stem, in_turn, roof
from benchmarks.plot import draw
from benchmarks.processes import Contender, Spec
from benchmarks.workload import sequences, useful_flops
from lib.catalog import RELEASED
from lib.console.arguments import arguments
from lib.console.output import note, print_json, print_line, print_table
from lib.console.program import run_script
from lib.models.detection import detect
from lib.models.untrained import make_folder, make_model
from lib.network.device import choose_device, choose_pack, device_name
from lib.settings import load_settings

SIZES = {name.split("_")[2]: name for name in RELEASED}
DEFAULT_CASES = ["8M:orf:1500", "35M:proteome:80", "150M:proteome:30", "650M:orf:40"]
# Peers with a type of half the bytes or less beside float32; None: the same as this project.
PEERS = {"transformers": None, "openvino": None, "esm-cpp": "int8"}
_ON_CPU_ONLY = ["openvino", "esm-cpp"]
_COLUMNS = [
    "case", "contender", "tokens/s", "spread", "of roof", "x fair-esm", "x transformers",
    "x openvino", "x esm-cpp", "cosine", "error", "start (s)", "peak (GB)",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print one table, write the figures and the plot."""
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, metavar="SIZE:MIX:SEQUENCES")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", nargs="+", default=[], choices=_ON_CPU_ONLY, metavar="PEER")
    parser.add_argument("--to", type=Path, default=Path("benchmarks"), help="folder of the figures")
    parsed = parser.parse_args(argv)
    settings = load_settings(parsed.config)
    device, _ = choose_device(settings.compute)
    date = datetime.now(UTC).date().isoformat()
    machine = f"{device_name(device)}, {os.cpu_count()} cores"
    stem = figures_stem(parsed.to, f"{date}-{machine}")
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
        result["cases"].append(measure_case(case, parsed, device))
        # After each, as the next may not fit into memory.
        stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, stem.with_suffix(".png"))
    if parsed.json:
        print_json(result)
    else:
        print_line(f"untrained weights; {result['machine']}; {result['versions']}")
        print_table(_COLUMNS, [row for case in result["cases"] for row in table_rows(case)])
    return 0 if all(one["agrees"] for case in result["cases"] for one in case["contenders"]) else 1


def measure_case(case: str, parsed: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the figures of one case."""
    size, mix, count = case.split(":")
    shape = RELEASED[SIZES[size]].shape
    workload = sequences(mix, int(count))
    lengths = [len(one) for one in workload]
    tokens = sum(lengths) + 2 * len(lengths)
    flops = useful_flops(lengths, shape.num_layers, shape.hidden_dim)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"esm2_untrained_{size}.pt"
        make_model(path, shape.num_layers, shape.hidden_dim, shape.attention_heads)
        settings = load_settings(parsed.config, {"model.esm_model": str(path)})
        detection = detect(settings.model)
        roofs = {dtype: roof(dtype, device) for dtype in (torch.float32, half)}
        without = parsed.without if device.type == "cpu" else _ON_CPU_ONLY
        specs = _specs(path, device, half, choose_pack(settings.compute, device)[0], without)
        if "esm-cpp" not in without:
            like = (shape.num_layers, shape.hidden_dim, shape.attention_heads)
            make_folder(_folder_beside(path), *like)
        contenders = {f"{spec.name} {spec.dtype}": Contender(spec) for spec in specs}
        note(f"{case}: {tokens} tokens, {len(contenders)} contenders")
        figures = in_turn(contenders, workload, parsed.repeats)
        peaks = {name: contender.peak_bytes() for name, contender in contenders.items()}
        vectors = {
            name: contender.vectors(workload) if _gives_logits(name) else figures[name].vectors
            for name, contender in contenders.items()
        }
        for contender in contenders.values():
            contender.close()
        roofs = {dtype: max(roofs[dtype], roof(dtype, device)) for dtype in roofs}
        share = end_to_end_share(settings, detection, workload, parsed.repeats)
    truth = figures["fair-esm float32"]
    rows = []
    for name, contender in contenders.items():
        kind = name.split()[1]
        cosine, error = agreement(vectors[name], vectors["fair-esm float32"])
        seconds = figures[name].seconds
        rows.append(
            {
                "contender": name,
                "seconds": [round(one, 3) for one in seconds],
                "tokens_per_second": round(tokens / statistics.median(seconds), 1),
                "share_of_roof": _share(flops / statistics.median(seconds), kind, roofs),
                "times_fair_esm": _ratio(truth.seconds, seconds),
                **{
                    f"times_{peer}": _ratio(figures[rival(peer, kind)].seconds, seconds)
                    for peer in PEERS
                    if rival(peer, kind) in figures
                },
                "cosine": round(cosine, 7),
                "error": float(f"{error:.1e}"),
                "start_seconds": round(contender.start_seconds, 2),
                "peak_gb": round(peaks[name] / 1e9, 2),
                "agrees": cosine >= AGREES[kind],
            }
        )
    return {
        "case": case,
        "tokens": tokens,
        "roof_gflops": {str(d).removeprefix("torch."): round(r / 1e9) for d, r in roofs.items()},
        "contenders": rows,
        "end_to_end_share_of_forward": [round(one, 3) for one in share],
    }


def table_rows(case: dict[str, Any]) -> list[list[object]]:
    """Return the rows of a case, without ratios where a side disagrees."""
    agree = {one["contender"]: one["agrees"] for one in case["contenders"]}
    rows: list[list[object]] = []
    for one in case["contenders"]:
        kind = one["contender"].split()[1]
        fast, slow = min(one["seconds"]), max(one["seconds"])
        own = one["agrees"] and agree["fair-esm float32"]
        times = [
            one.get(f"times_{peer}")
            if one["agrees"] and agree.get(rival(peer, kind), True)
            else "disagrees"
            for peer in PEERS
        ]
        rows.append(
            [
                case["case"], one["contender"], one["tokens_per_second"],
                f"{100 * (slow / fast - 1):.0f} %", one["share_of_roof"],
                one["times_fair_esm"] if own else "disagrees",
                *times, one["cosine"], one["error"], one["start_seconds"], one["peak_gb"],
            ]
        )  # fmt: skip
    share = statistics.median(case["end_to_end_share_of_forward"])
    rows.append([case["case"], "FASTA to commit, of forward alone", None, None, share])
    return [[*row, *[None] * (len(_COLUMNS) - len(row))] for row in rows]


def rival(peer: str, kind: str) -> str:
    """Return the contender of a peer that one in the type `kind` is compared with."""
    return f"{peer} {kind if kind == 'float32' else PEERS[peer] or kind}"


def _specs(
    path: Path, device: torch.device, half: torch.dtype, tokens: int, without: Sequence[str]
) -> list[Spec]:
    kinds = [str(dtype).removeprefix("torch.") for dtype in (torch.float32, half)]
    named = ["fair-esm float32"]
    for kind in kinds:
        named += [rival(peer, kind) for peer in PEERS if peer not in without]
        named.append(f"esm-ledger {kind}")
    specs = []
    for name, kind in map(str.split, named):
        weights = path if name != "esm-cpp" else _folder_beside(path) / "model.safetensors"
        specs.append(Spec(name, weights, str(device), kind, tokens))
    return specs


def _folder_beside(path: Path) -> Path:
    """Return where the weights of a case lie in Hugging Face's format."""
    return path.with_suffix("")


def _gives_logits(contender: str) -> bool:
    return contender.startswith("esm-cpp ")


def _share(rate: float, kind: str, roofs: Mapping[torch.dtype, float]) -> float | None:
    """Return the share of the roof in the type `kind`, if that roof was measured."""
    top = roofs.get(getattr(torch, kind))
    return round(rate / top, 3) if top else None


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2)


if __name__ == "__main__":
    run_script(main)
