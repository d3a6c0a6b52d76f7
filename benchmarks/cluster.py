"""What a cluster costs: Ray and the driver beside one process, and how many GPUs a driver can feed.

    python -m benchmarks.cluster --only overhead
    python -m benchmarks.cluster --only simulation --workers 64 --records 500000 --seconds 240
    python -m benchmarks.cluster --to cluster.json

overhead: processor time of two workers with one thread each over that of one process with two
threads, from the first stretch to the last commit; models are in memory. memory: growth of the
driver's peak memory with sent stretches of 10 and of 100 MB. driver: its processor time for
parsing, planning, cutting, handing over and verifying, and the GPUs that it could feed. simulation:
real Ray, real driver, real files; a worker sleeps for as long as its network would take.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.processes import peak_bytes
from benchmarks.sleeping import SLEEP, Sleep, SleepingActor
from benchmarks.workload import sequences
from lib.catalog import RELEASED
from lib.console.output import print_json, print_line, print_table
from lib.jobs import crew as crews
from lib.jobs import division
from lib.jobs.progress import computing_cost
from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.sequences.inventory import preflight
from lib.sequences.plan import packs_left
from lib.sequences.windows import read_windows
from lib.settings import DEFAULT_CONFIG, load_settings
from schema.parquet import vector_columns

RESIDUES_PER_GPU = 400_000  # a second, of an H100 with the 650M model
WIDTH = 1280


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(PARTS), action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument(
        "--records", type=int, default=500_000, help="of the simulation; the driver's are fewer"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="of the simulation, at best")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write all figures as JSON")
    parsed = parser.parse_args(argv)
    found = {}
    for name in parsed.only or PARTS:
        print_line(f"\n{name}")
        found[name] = PARTS[name](parsed)
    if parsed.to is not None:
        parsed.to.write_text(json.dumps(found, indent=1))
    print_json(found)
    return 0


# ---- Ray beside one process


def overhead(parsed: argparse.Namespace) -> Any:  # noqa: ANN401
    """Compare processor times of the same work, in turn."""
    rows, found = [], {}
    for shape, count in (("esm2_t6_8M_UR50D", 2_000), ("esm2_t12_35M_UR50D", 300)):
        with workplace(shape, sequences("uniref", count)) as (folder, flags):
            ratios, stretches = [], 0
            for _ in range(parsed.repeats):
                alone = in_process(embed_seconds, folder, [*flags, "--set", "compute.threads=2"])
                on_ray = ["--ray", "auto", "--set", "cluster.threads_per_worker=1"]
                spread = in_process(embed_seconds, folder, [*flags, *on_ray])
                ratios.append(spread["processor_s"] / alone["processor_s"])
                stretches = spread["checkpoints"]
            found[shape] = {"ratios": ratios, "stretches": stretches}
            rows.append([shape, count, f"{statistics.median(ratios):.3f}", stretches])
    print_table(["model", "records", "processor time, workers / process", "stretches"], rows)
    return found


def memory(parsed: argparse.Namespace) -> Any:  # noqa: ANN401
    """Compare the driver's peak memory with small and large stretches that are sent."""
    rows, found = [], {}
    flags = ["--ray", "auto", "--set", "cluster.threads_per_worker=1", "--include", "per_tok"]
    flags += ["--set", "cluster.files=sent", "--set", "output.checkpoint_seconds=100000"]
    with workplace("esm2_t6_8M_UR50D", sequences("uniref", 4_000)) as (folder, common):
        for megabytes in (10, 100):
            one = in_process(embed_seconds, folder, [*common, *flags], megabytes)
            found[f"{megabytes} MB"] = one
            grown = (one["peak_bytes"] - one["before_bytes"]) / 1e6
            rows.append([megabytes, one["checkpoints"], f"{grown:.0f}"])
    print_table(["stretch, MB", "stretches", "driver's growth, MB"], rows)
    return found


def embed_seconds(folder: Path, flags: Sequence[str], megabytes: int = 256) -> dict[str, Any]:
    """Embed in this process; return the processor time and the memory of the work itself.

    Of a cluster, that of the driver, the workers and Ray's own processes.
    """
    figures: dict[str, Any] = {}
    embedding: Any = importlib.import_module("lib.console.embedding")
    true = embedding.work

    def work(job: Any) -> Any:  # noqa: ANN401
        before, figures["before_bytes"] = processor_seconds(), peak_bytes()
        run = true(job)
        figures["processor_s"] = processor_seconds() - before
        figures["checkpoints"] = len(run.checkpoints)
        figures["peak_bytes"] = peak_bytes()
        return run

    with (
        mock.patch.object(embedding, "work", work),
        mock.patch.object(crews.Crew, "wait_for_one", waiting_for(2)),
        mock.patch.object(division, "_LARGEST_BYTES", megabytes << 20),
    ):
        embed(folder, flags)
    return figures


# ---- What the driver does, by the record


def driver(parsed: argparse.Namespace) -> Any:  # noqa: ANN401
    """Time what the driver does for each residue, and tell how many GPUs it can feed."""
    count, rows, found = min(50_000, parsed.records), [], dict[str, Any]()
    with workplace("esm2_t6_8M_UR50D", sequences("uniref", count)) as (folder, _flags):
        config = {"model.esm_model": str(folder / "model.pt"), "input.fasta": str(folder / "in.fa")}
        rules = load_settings(DEFAULT_CONFIG, config).input
        inventory, read = seconds(lambda: preflight(rules))
        packs, planned = seconds(
            lambda: list(packs_left(read_windows(rules, inventory), 32_768, 1, []))
        )
        _, handed = seconds(lambda: [pickle.dumps(pack, protocol=5) for pack in packs])
        _, cut = seconds(lambda: cost_of_packs(packs))
        content = np.random.default_rng(0).bytes(256 << 20)
        _, verified = seconds(lambda: hashlib.sha256(content).hexdigest())
        each = inventory.residues / count
        once = {"preflight": read, "read and plan": planned, "cut": cut, "hand over": handed}
        per_residue = sum(once.values()) / inventory.residues
        found = {f"{name}, µs per record": 1e6 * one / count for name, one in once.items()}
        found["sha256, GB/s"] = len(content) / 1e9 / verified
        bytes_of = {
            "mean": 4 * WIDTH + 100,
            "mean bos": 8 * WIDTH + 100,
            "per_tok (float16)": 2 * WIDTH * each,
            "contacts": 4 * float((inventory.lengths.astype(float) ** 2).mean()),
        }
        for include, size in bytes_of.items():
            # A shared file is read and digested once; a sent one is copied and written besides.
            shared = per_residue + size / each * verified / len(content)
            gpus = 1 / (shared * RESIDUES_PER_GPU)
            rate = gpus * RESIDUES_PER_GPU * size / each / 1e9
            found[include] = {"gpus": gpus, "gigabytes_per_second": rate}
            rows.append([include, f"{gpus:.0f}", f"{rate:.2f}"])
    print_table(["include", "GPUs that one driver feeds", "GB/s of files then"], rows)
    return found


def cost_of_packs(packs: Sequence[Any]) -> float:
    """Cut packs into stretches as for 64 workers; returns their cost."""
    rules = division.SizeRules(60.0, 20_000, 1, vector_columns(["mean"], [33]), WIDTH)
    cut = division.Division(
        packs, rules, lambda some: computing_cost(np.asarray(some), WIDTH), 1e12
    )
    total = 0.0
    while (stretch := cut.next(1e9, 64)) is not None:
        total += stretch.cost
    return total


# ---- Many workers


def simulation(parsed: argparse.Namespace) -> Any:  # noqa: ANN401
    """Run many workers that sleep; tell how near to linear it is, and the driver's memory."""
    with workplace("esm2_t6_8M_UR50D", sequences("uniref", parsed.records)) as (folder, flags):
        found = in_process(simulate, folder, flags, parsed.workers, parsed.seconds)
    line = f"{parsed.workers} workers, {parsed.records} records, {found['checkpoints']} stretches: "
    line += f"{100 * found['of_linear']:.1f} % of linear, driver's peak "
    print_line(f"{line}{found['peak_bytes'] / 1e9:.2f} GB, {found['driver_s']:.0f} s of processor")
    return found


def simulate(folder: Path, flags: Sequence[str], workers: int, best: float) -> dict[str, Any]:
    """Embed with workers that sleep, `best` seconds if all of them were busy all the time."""
    settings = load_settings(
        DEFAULT_CONFIG,
        {"model.esm_model": str(folder / "model.pt"), "input.fasta": str(folder / "in.fa")},
    )
    detection = detect(settings.model)
    weights = detection.require_weights()
    width = detection.shape.hidden_dim
    cost = computing_cost(preflight(settings.input).lengths, width)
    sleep = Sleep(detection.config(weights.sha256()).snapshot(), width, cost / (workers * best))
    figures: dict[str, Any] = {"workers": workers, "best_s": best}
    embedding: Any = importlib.import_module("lib.console.embedding")
    true = embedding.work

    def work(job: Any) -> Any:  # noqa: ANN401
        start, before = time.perf_counter(), time.process_time()
        run = true(job)
        figures["seconds"] = time.perf_counter() - start
        figures["driver_s"] = time.process_time() - before
        figures["of_linear"] = best / figures["seconds"]
        figures["checkpoints"] = len(run.checkpoints)
        figures["peak_bytes"] = peak_bytes()
        return run

    with (
        mock.patch.object(embedding, "work", work),
        mock.patch.object(crews, "Actor", SleepingActor),
        mock.patch.object(crews.Crew, "wait_for_one", waiting_for(workers)),
        # Workers that sleep need no CPU of their own.
        mock.patch.dict(os.environ, RAY_OVERRIDE_RESOURCES=json.dumps({"CPU": workers})),
        mock.patch.dict(os.environ, {SLEEP: json.dumps(asdict(sleep))}),
    ):
        embed(folder, [*flags, "--ray", "auto", "--set", "cluster.threads_per_worker=1"])
    return figures


# ---- What all of them need


@contextmanager
def workplace(shape: str, some: Sequence[bytes]) -> Any:  # noqa: ANN401
    """Yield a folder with an untrained model and a FASTA file, and the flags for both."""
    with tempfile.TemporaryDirectory(prefix="esm-ledger-") as name:
        folder = Path(name)
        of = RELEASED[shape].shape
        make_model(folder / "model.pt", of.num_layers, of.hidden_dim, of.attention_heads)
        entries = (b">%d\n%s\n" % (i, residues) for i, residues in enumerate(some))
        (folder / "in.fa").write_bytes(b"".join(entries))
        flags = ["--esm-model", str(folder / "model.pt"), "--input", str(folder / "in.fa")]
        yield folder, flags


def embed(folder: Path, flags: Sequence[str]) -> None:
    """Run embed.py's main in this process, with a database and an output folder of its own."""
    main_of_embed: Callable[[Sequence[str]], int] = importlib.import_module("scripts.embed").main
    with tempfile.TemporaryDirectory(dir=folder) as out:
        said = [*flags, "--output", f"{out}/out", "--database", f"{out}/runs.sqlite"]
        with open(os.devnull, "w") as nowhere, mock.patch.object(sys, "stdout", nowhere):
            assert main_of_embed([*said, "--set", "compute.device=cpu"]) == 0


def in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """Call a function in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def waiting_for(count: int) -> Callable[[crews.Crew], None]:
    """Return a `wait_for_one` that waits for more, so that starting up is not measured."""

    def wait(crew: crews.Crew) -> None:
        while len(crew.admitted) < count:
            crew.tend()
            crew.mail.handle_next(1.0)

    return wait


def processor_seconds() -> float:
    """Return the processor time of this process and of all that descend from it."""
    parents, spent = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(stat.parent.name)
        parents[number] = int(fields[1])
        spent[number] = sum(map(int, fields[11:15]))  # its own, and of children that have ended
    family = {os.getpid()}
    while True:
        more = {one for one, parent in parents.items() if parent in family} - family
        if not more:
            return sum(spent[one] for one in family) / os.sysconf("SC_CLK_TCK")
        family |= more


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its processor time."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "overhead": overhead,
    "memory": memory,
    "driver": driver,
    "simulation": simulation,
}

if __name__ == "__main__":
    sys.exit(main())
