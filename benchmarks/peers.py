"""Peers: this project, fair-esm, transformers, OpenVINO and esm.cpp compute the same cases.

All get the same weights and sequences, and compute in turn, each in its own process; what they
give is compared with fair-esm's in float32.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import AGREES, agreement, end_to_end_share, in_turn, roof
from benchmarks.processes import Contender, Spec
from benchmarks.workload import Case, sequences, useful_flops
from lib.console.output import note
from lib.models.detection import detect
from lib.models.untrained import make_folder, make_model
from lib.network.device import choose_pack
from lib.settings import load_settings

__all__ = ["COLUMNS", "PEERS", "contender_specs", "measure_case", "rival", "table_rows"]

# Peers with a type of half the bytes or less beside float32; None: the same as this project.
PEERS = {"transformers": None, "openvino": None, "esm-cpp": "int8"}
_ON_CPU_ONLY = ["openvino", "esm-cpp"]
COLUMNS = [
    "case", "contender", "tokens/s", "spread", "of roof", "x fair-esm", "x transformers",
    "x openvino", "x esm-cpp", "cosine", "error", "start (s)", "peak (GB)",
]  # fmt: skip


def measure_case(
    case: Case,
    device: torch.device,
    *,
    config: Path,
    repeats: int,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the figures of one case; `without` names peers to leave out."""
    shape = case.shape
    workload = sequences(case.mix, case.count)
    lengths = [len(one) for one in workload]
    tokens = sum(lengths) + 2 * len(lengths)
    flops = useful_flops(lengths, shape.num_layers, shape.hidden_dim)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"esm2_untrained_{case.size}.pt"
        make_model(path, shape.num_layers, shape.hidden_dim, shape.attention_heads)
        settings = load_settings(config, {"model.esm_model": str(path)})
        detection = detect(settings.model)
        roofs = {dtype: roof(dtype, device) for dtype in (torch.float32, half)}
        specs = contender_specs(
            path, device, half, choose_pack(settings.compute, device)[0], without
        )
        if any(spec.name == "esm-cpp" for spec in specs):
            like = (shape.num_layers, shape.hidden_dim, shape.attention_heads)
            make_folder(_folder_beside(path), *like)
        contenders = {f"{spec.name} {spec.dtype}": Contender(spec) for spec in specs}
        note(f"{case}: {tokens} tokens, {len(contenders)} contenders")
        figures = in_turn(contenders, workload, repeats)
        peaks = {name: contender.peak_bytes() for name, contender in contenders.items()}
        vectors = {
            name: contender.vectors(workload) if _gives_logits(name) else figures[name].vectors
            for name, contender in contenders.items()
        }
        for contender in contenders.values():
            contender.close()
        roofs = {dtype: max(roofs[dtype], roof(dtype, device)) for dtype in roofs}
        share = end_to_end_share(settings, detection, workload, repeats)
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
        "case": str(case),
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
    return [[*row, *[None] * (len(COLUMNS) - len(row))] for row in rows]


def rival(peer: str, kind: str) -> str:
    """Return the contender of a peer that one in the type `kind` is compared with."""
    return f"{peer} {kind if kind == 'float32' else PEERS[peer] or kind}"


def contender_specs(
    path: Path, device: torch.device, half: torch.dtype, tokens: int, without: Sequence[str]
) -> list[Spec]:
    """Return what is measured on the weights at `path`, in the order of the table.

    half: the type beside float32; tokens: of a pack; without: peers that are left out.
    """
    left_out = [*without, *([] if device.type == "cpu" else _ON_CPU_ONLY)]
    kinds = [str(dtype).removeprefix("torch.") for dtype in (torch.float32, half)]
    named = ["fair-esm float32"]
    for kind in kinds:
        named += [rival(peer, kind) for peer in PEERS if peer not in left_out]
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
