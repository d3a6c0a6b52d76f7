"""What a GPU embeds, in three parts of less than ten minutes each, on untrained weights.

    make benchmark-cuda
    make benchmark-cuda ARGS='--part 2'
    python -m benchmarks.cuda --list

Part 1 measures the shapes 8M, 35M and 150M, part 2 650M, part 3 3B: this project in float16 and
bfloat16, compiled and not, beside transformers with SDPA and with FlashAttention (where the package
flash_attn is) in the same types, and fair-esm's own loop in float32 on a tenth of the sequences.
The rate of a matrix product in each type (the roof) is measured with each shape, and the whole way
from FASTA to commit in float16. Every figure is written to FOLDER/cuda-MACHINE.json as soon as it
is there: what has its figure is not measured again, so that a part that was cut off is continued
by the same command. A contender that fails is written down with its reason, and tried again by the
next command. No measurement is begun after --minutes. Exit status: 0 measured, 1 a side disagreed,
failed or is left, 4 no CUDA.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contenders import Embed, fair_esm, ours, transformers_sdpa
from benchmarks.measure import (
    AGREES,
    agreement,
    end_to_end_seconds,
    figures_stem,
    in_turn,
    roof,
)
from benchmarks.workload import sequences, useful_flops
from lib.catalog import RELEASED
from lib.console.arguments import arguments
from lib.console.output import note, print_json, print_line, print_table
from lib.console.program import run_script
from lib.files import new_path
from lib.models.detection import Detection, detect
from lib.models.untrained import make_model
from lib.network.device import choose_device, choose_pack, device_name
from lib.network.elementwise import compiled
from lib.settings import load_settings, override
from schema.esm2_config import ModelShape

__all__ = ["CONTENDERS", "PARTS", "RUNS", "Case", "Measurement", "main", "table_rows"]

FAIR_ESM = "fair-esm float32"
_HALVES = ("float16", "bfloat16")
# fair-esm computes every tenth sequence: it is some ten times slower.
_OF_FAIR_ESM = slice(None, None, 10)
_COLUMNS = [
    "case", "contender", "tokens/s", "spread", "of roof", "x fair-esm", "x transformers", "cosine",
    "error", "start (s)", "peak (GB)",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape, and how many sequences with the lengths of UniRef50 go through it."""

    name: str
    shape: ModelShape
    records: int


def _released(size: str, records: int) -> Case:
    (shape,) = [one.shape for name, one in RELEASED.items() if name.split("_")[2] == size]
    return Case(size, shape, records)


PARTS = {
    1: [_released("8M", 30_000), _released("35M", 20_000), _released("150M", 10_000)],
    2: [_released("650M", 5_000)],
    3: [_released("3B", 1_500)],
}


Ready = Callable[[Detection, torch.device, int], Embed]


def _transformers(kind: str, attention: str) -> Ready:
    def ready(found: Detection, device: torch.device, _tokens: int) -> Embed:
        return transformers_sdpa(found, device, getattr(torch, kind), attention)

    return ready


def _ours(kind: str, *, is_compiled: bool) -> Ready:
    def ready(found: Detection, device: torch.device, tokens: int) -> Embed:
        steps = compiled() if is_compiled else None
        return ours(found, device, getattr(torch, kind), tokens, steps)

    return ready


# What makes a contender ready, given the tokens of a pack; the last word is its type.
CONTENDERS: dict[str, Ready] = {FAIR_ESM: lambda found, device, _tokens: fair_esm(found, device)}
for _kind in _HALVES:
    CONTENDERS[f"transformers {_kind}"] = _transformers(_kind, "sdpa")
    CONTENDERS[f"transformers FlashAttention {_kind}"] = _transformers(_kind, "flash_attention_2")
    CONTENDERS[f"esm-ledger {_kind}"] = _ours(_kind, is_compiled=False)
    CONTENDERS[f"esm-ledger compiled {_kind}"] = _ours(_kind, is_compiled=True)
# Runs of this project, with model in memory.
RUNS = ["FASTA to commit float16", "FASTA to commit compiled float16"]


def missing_package(name: str) -> str | None:
    """Return the package that a contender needs and that is not installed."""
    needed = "flash_attn" if "FlashAttention" in name else None
    return needed if needed and find_spec(needed) is None else None


@dataclass
class _Work:
    """A case made ready: its model, its sequences, and what fair-esm found for a tenth of them."""

    case: Case
    found: Detection
    sequences: list[bytes]
    truth: npt.NDArray[np.float32] | None = None


class Measurement:
    """What is measured on a device, and the file that has the figures measured so far.

    `until` is when the last measurement begins, by time.monotonic().
    """

    def __init__(
        self, device: torch.device, config: Path, to: Path, repeats: int, until: float
    ) -> None:
        self.device, self.config, self.repeats, self.until = device, config, repeats, until
        self.path = figures_stem(to, f"cuda-{device_name(device)}").with_suffix(".json")
        self.tokens_per_pack = choose_pack(load_settings(config).compute, device)[0]
        self.result: dict[str, Any] = {
            "machine": device_name(device),
            "weights": "untrained",
            "versions": _versions(),
            "tokens_per_pack": self.tokens_per_pack,
            "cases": {},
        }
        if self.path.exists():
            self.result["cases"] = json.loads(self.path.read_text(encoding="utf-8"))["cases"]

    def measure(self, case: Case) -> bool:
        """Measure what has no figures yet; return whether all has them now."""
        known = self.result["cases"].setdefault(case.name, {"contenders": {}})
        left = [name for name in (*CONTENDERS, *RUNS) if _is_left(name, known["contenders"])]
        if not left or time.monotonic() >= self.until:
            return not left
        workload = sequences("uniref", case.records)
        tokens = sum(len(one) + 2 for one in workload)
        note(f"{case.name}: {len(workload)} sequences, {tokens} tokens; to measure: {len(left)}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"esm2_untrained_{case.name}.pt"
            shape = case.shape
            make_model(path, shape.num_layers, shape.hidden_dim, shape.attention_heads)
            found = detect(load_settings(self.config, {"model.esm_model": str(path)}).model)
            known |= {
                "records": len(workload),
                "tokens": tokens,
                "roof_gflops": {
                    kind: round(roof(getattr(torch, kind), self.device) / 1e9) for kind in _HALVES
                },
            }
            work = _Work(case, found, workload)
            # The others are compared with its vectors, which are in no file.
            for name in dict.fromkeys([FAIR_ESM, *left]):
                if time.monotonic() >= self.until:
                    return False
                known["contenders"][name] = self._measured(name, work)
                self._write()
        return True

    def _measured(self, name: str, work: _Work) -> dict[str, Any]:
        """Return the figures of one contender, or why there are none."""
        note(f"{work.case.name}: {name}")
        if missing_package(name):
            return {"missing": f"no package {missing_package(name)}"}
        _forget(self.device)
        try:
            return self._to_commit(name, work) if name in RUNS else self._embedded(name, work)
        # Whatever it is, what others need the GPU for is not lost by it.
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            note(f"{work.case.name}: {name}: {type(error).__name__}: {why}")
            return {"failed": f"{type(error).__name__}: {why}"}

    def _embedded(self, name: str, work: _Work) -> dict[str, Any]:
        """Return the figures of a contender that embeds; keep the vectors that are the truth."""
        mine = work.sequences[_OF_FAIR_ESM] if name == FAIR_ESM else work.sequences
        lengths = [len(one) for one in mine]
        tokens = sum(lengths) + 2 * len(lengths)
        begun = time.perf_counter()
        embed = CONTENDERS[name](work.found, self.device, self.tokens_per_pack)
        start = time.perf_counter() - begun
        _forget(self.device)  # what loading took
        measured = in_turn({name: embed}, mine, self.repeats)[name]
        typical = statistics.median(measured.seconds)
        kind = name.split()[-1]
        figures = {
            "seconds": [round(one, 3) for one in measured.seconds],
            "tokens_per_second": round(tokens / typical, 1),
            "start_seconds": round(start, 2),
            "peak_gb": _peak_gb(self.device),
        }
        if kind in _HALVES:
            top = 1e9 * self.result["cases"][work.case.name]["roof_gflops"][kind]
            flops = useful_flops(lengths, work.case.shape.num_layers, work.case.shape.hidden_dim)
            figures["share_of_roof"] = round(flops / typical / top, 3)
        if name == FAIR_ESM:
            work.truth = measured.vectors
        elif work.truth is not None:
            cosine, error = agreement(measured.vectors[_OF_FAIR_ESM], work.truth)
            figures |= {"cosine": round(cosine, 7), "error": float(f"{error:.1e}")}
            figures["agrees"] = cosine >= AGREES[kind]
        return figures

    def _to_commit(self, name: str, work: _Work) -> dict[str, Any]:
        """Return the rates of the network alone and of the whole way from FASTA to commit."""
        said = {
            "model.esm_model": str(work.found.require_weights().path),
            "compute.device": str(self.device),
            "compute.precision": name.split()[-1],
            "compute.compile": str("compiled" in name),
        }
        settings = override(load_settings(self.config), said)
        pairs = end_to_end_seconds(settings, work.found, work.sequences, self.repeats)
        tokens = sum(len(one) + 2 for one in work.sequences)
        forward, whole = (statistics.median(one) for one in zip(*pairs, strict=True))
        return {
            "seconds": [round(one, 3) for _, one in pairs],
            "tokens_per_second": round(tokens / whole, 1),
            "records_per_second": round(len(work.sequences) / whole, 1),
            "forward_tokens_per_second": round(tokens / forward, 1),
            "peak_gb": _peak_gb(self.device),
        }

    def _write(self) -> None:
        self.result["date"] = datetime.now(UTC).date().isoformat()
        with new_path(self.path, folder=False, replaceable=lambda _: True) as part:
            part.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts that were asked for, and print all that is known of this machine."""
    parser = arguments(__doc__)
    parser.add_argument("--part", nargs="+", type=int, choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--list", action="store_true", help="print what the parts measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="of each part (default 9)")
    parser.add_argument("--to", type=Path, default=Path("benchmarks"), metavar="FOLDER")
    parsed = parser.parse_args(argv)
    if parsed.list:
        rows = [[n, one.name, one.records] for n, cases in PARTS.items() for one in cases]
        print_table(["part", "case", "sequences"], rows)
        return 0
    settings = override(load_settings(parsed.config), {"compute.device": "cuda"})
    device, _ = choose_device(settings.compute)
    done = []
    for part in parsed.part:
        until = time.monotonic() + 60 * parsed.minutes
        measurement = Measurement(device, parsed.config, parsed.to, parsed.repeats, until)
        done += [measurement.measure(case) for case in PARTS[part]]
    result = measurement.result
    if parsed.json:
        print_json(result)
    else:
        print_line(f"untrained weights; {result['machine']}; {result['versions']}")
        print_table(_COLUMNS, table_rows(result))
    if not all(done):
        note(f"{parsed.minutes} minutes are over: the same command measures what is left")
    figures = [one for case in result["cases"].values() for one in case["contenders"].values()]
    failed = any("failed" in one or one.get("agrees") is False for one in figures)
    return 0 if all(done) and not failed else 1


def table_rows(result: Mapping[str, Any]) -> list[list[object]]:
    """Return a row for each figure, without ratios where a side disagrees or has none."""
    rows: list[list[object]] = []
    for name, case in result["cases"].items():
        rates = {
            who: one["tokens_per_second"]
            for who, one in case["contenders"].items()
            if one.get("agrees", who == FAIR_ESM)
        }
        for who, one in case["contenders"].items():
            if "seconds" not in one:
                rows.append([name, who, one.get("missing") or one["failed"]])
                continue
            own = rates.get(who)
            rivals = [rates.get(FAIR_ESM), rates.get(f"transformers {who.split()[-1]}")]
            times = [round(own / rival, 2) if own and rival else None for rival in rivals]
            fast, slow = min(one["seconds"]), max(one["seconds"])
            rows.append(
                [
                    name, who, one["tokens_per_second"], f"{100 * (slow / fast - 1):.0f} %",
                    one.get("share_of_roof"), *times,
                    one.get("cosine"), one.get("error"), one.get("start_seconds"), one["peak_gb"],
                ]
            )  # fmt: skip
    return [[*row, *[None] * (len(_COLUMNS) - len(row))] for row in rows]


def _is_left(name: str, known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether something is to be measured, or tried or compared again."""
    one = known.get(name, {})
    if "seconds" in one:
        return name in CONTENDERS and name != FAIR_ESM and "agrees" not in one
    return not ("missing" in one and missing_package(name))


def _versions() -> dict[str, str | None]:
    named = {name: version(name) for name in ("torch", "fair-esm", "transformers")}
    return {"python": platform.python_version(), **named, "cuda": torch.version.cuda}


def _forget(device: torch.device) -> None:
    """Give the memory of the contender before back, and begin to measure the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gb(device: torch.device) -> float | None:
    """Return the largest memory that tensors took on a GPU since `_forget`."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


if __name__ == "__main__":
    run_script(main)
