"""Measuring: contenders in turn on one workload, the machine's roof, and the whole way to disk."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.contenders import Embed
from lib.errors import SettingsError
from lib.jobs.embedding import Job, ThisProcess, work
from lib.jobs.interruption import Interruption
from lib.jobs.loading import load_model
from lib.ledger.database import open_for_writing
from lib.ledger.runs import create_run
from lib.models.detection import Detection
from lib.network.device import packs_at_once
from lib.network.pipeline import lanes
from lib.sequences.alphabet import tokenise
from lib.sequences.inventory import preflight
from lib.sequences.plan import plan_packs
from lib.settings import Settings, override

__all__ = [
    "AGREES",
    "Figures",
    "agreement",
    "end_to_end_seconds",
    "end_to_end_share",
    "figures_stem",
    "in_turn",
    "roof",
    "unused_stem",
]

# A side whose worst pooled cosine with fair-esm is lower did not do the same computation.
AGREES = {"float32": 0.999999, "bfloat16": 0.99, "float16": 0.999, "int8": 0.99}

_ROOF_SIZE = 2048


@dataclass(frozen=True)
class Figures:
    """Seconds of every repeat, and the vectors of the last."""

    seconds: list[float]
    vectors: npt.NDArray[np.float32]


def in_turn(
    contenders: Mapping[str, Embed], sequences: Sequence[bytes], repeats: int
) -> dict[str, Figures]:
    """Time each contender `repeats` times, A B C A B C …, after one uncounted short run each."""
    for embed in contenders.values():
        embed(sequences[: max(2, len(sequences) // 10)])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    for _ in range(repeats):
        for name, embed in contenders.items():
            start = time.perf_counter()
            vectors[name] = embed(sequences)
            seconds[name].append(time.perf_counter() - start)
    return {name: Figures(seconds[name], vectors[name]) for name in contenders}


def roof(dtype: torch.dtype, device: torch.device, repeats: int = 7) -> float:
    """Return the median rate of a square matrix product, floating-point operations per second."""
    size = _ROOF_SIZE if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> float:
        _synchronise(device)
        start = time.perf_counter()
        a @ b
        _synchronise(device)
        return time.perf_counter() - start

    product()
    return 2 * size**3 / statistics.median(product() for _ in range(repeats))


def agreement(
    found: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]
) -> tuple[float, float]:
    """Return the worst cosine and the worst relative L2 error of pooled vectors, row by row."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(truth, axis=1)
    cosine = float(((found * truth).sum(1) / norms).min())
    error = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    return cosine, float(error.max())


def end_to_end_share(
    settings: Settings, detection: Detection, sequences: Sequence[bytes], repeats: int
) -> list[float]:
    """Return, for every repeat, the time of forward alone over that of FASTA to commit."""
    pairs = end_to_end_seconds(settings, detection, sequences, repeats)
    return [forward / whole for forward, whole in pairs]


def end_to_end_seconds(
    settings: Settings, detection: Detection, sequences: Sequence[bytes], repeats: int
) -> list[tuple[float, float]]:
    """Return, for every repeat, the seconds of forward alone and those of FASTA to commit.

    Both have the model in memory and the same packs; the second reads and checks the FASTA,
    tokenises, pools, writes Parquet and commits.
    """
    model = load_model(settings, detection, "0" * 64)
    pairs = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        fasta = folder / "input.fasta"
        fasta.write_bytes(
            b"".join(b">s%d\n%s\n" % (i, residues) for i, residues in enumerate(sequences))
        )
        # The precision that was chosen stands in the loaded model's settings.
        ready = override(
            model.settings,
            {
                "input.fasta": str(fasta),
                "output.folder": str(folder / "out"),
                "database.url": str(folder / "runs.sqlite"),
            },
        )
        model = replace(model, settings=ready)
        engine = opened.enter_context(open_for_writing(ready.database.url))
        ordered = sorted(sequences, key=len, reverse=True)
        device = model.network.device
        plan = plan_packs(
            [len(one) for one in ordered], ready.compute.tokens_per_pack, packs_at_once(device)
        )
        tokens = [torch.from_numpy(tokenise(ordered[p.start : p.stop])) for p in plan]
        lengths = [[len(one) for one in ordered[p.start : p.stop]] for p in plan]
        last = [model.network.shape.num_layers]

        def forward_one(pack: torch.Tensor, sizes: list[int]) -> None:
            with torch.inference_mode():
                for _layer, hidden in model.network.forward(pack, sizes, last):
                    hidden[0, 0].item()

        def forward() -> None:
            with lanes(device) as (executor, _ahead):
                packs = zip(tokens, lengths, strict=True)
                for done in [executor.submit(forward_one, *one) for one in packs]:
                    done.result()

        def whole() -> None:
            found = preflight(ready.input)
            computer = ThisProcess(device, lambda: model.network)
            with create_run(engine, ready, model.config, found, model.facts) as ownership:
                work(
                    Job(
                        engine, ownership, ready, found, computer, Interruption(),
                        lambda _: None,
                    )
                )  # fmt: skip

        for _ in range(repeats):
            pairs.append((_seconds(forward), _seconds(whole)))
    return pairs


def figures_stem(to: Path, words: str) -> Path:
    """Return where figures are written, without the suffix; raises SettingsError for no folder.

    To be asked for before anything is measured. words: what they are of, with any letters.
    """
    if not to.is_dir():
        raise SettingsError(f"--to {to}: no such folder")
    letters = "".join(c if c.isalnum() else "-" for c in words.lower())
    return to / letters.replace("--", "-")


def unused_stem(stem: Path) -> Path:
    """Return `stem`, with a number if there are figures of that name already."""
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in itertools.count(2))
    stems = itertools.chain([stem], numbered)
    return next(one for one in stems if not one.with_suffix(".json").exists())


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
