"""The pipeline: if this fails, vectors stand at other proteins or finished ones are lost.

On a GPU a pack is launched before the one before it is collected. Here the same is tried on a CPU,
which has a way of its own: two packs at once, each on half of the threads.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.columns import Vectors
from lib.errors import MachineError
from lib.jobs import loading
from lib.models.detection import detect
from lib.network import pipeline, pooling, vectors
from lib.network.esm2 import Network, load_network
from lib.network.groups import Group
from lib.network.memory import pack_bytes
from lib.network.pipeline import StoppedError, computed
from lib.network.vectors import Launched
from lib.sequences import inventory as inventories
from lib.sequences.plan import Pack
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence as FastaSequence
from lib.settings import load_settings
from schema.parquet import VectorColumn
from tests import processes
from tests.conftest import SOME_PROTEINS, Answer, Place, Script
from tests.reference import fasta, read_run

Step = Callable[[str], None]


class Steps:
    """What was launched and collected, in order; `before(step)` may do harm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.before: Step = lambda step: None
        launch, collect = vectors.launch, Launched.collect

        def launched(*arguments: Any) -> Launched:  # noqa: ANN401 (handed on as it came)
            self._step("launch")
            return launch(*arguments)

        def collected(pack: Launched) -> Vectors:
            self._step("collect")
            return collect(pack)

        monkeypatch.setattr(pipeline, "launch", launched)
        monkeypatch.setattr(Launched, "collect", collected)

    def _step(self, kind: str) -> None:
        step = f"{kind} {1 + sum(one.startswith(kind) for one in self.seen)}"
        self.before(step)
        self.seen.append(step)


MEAN = VectorColumn("mean", 2)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """One pack ahead, as on CUDA."""
    one_pack_on_way(monkeypatch, ahead=1)
    return Steps(monkeypatch)


def one_pack_on_way(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Compute packs in the thread that asks, so many of them ahead."""

    @contextmanager
    def lanes(_device: torch.device) -> Iterator[tuple[Executor, int]]:
        yield pipeline._Here(), ahead

    monkeypatch.setattr(pipeline, "lanes", lanes)


def embed(script: Script, model: Path, *flags: str) -> Answer:
    # Every protein is a pack of its own.
    own = ["--set", "compute.tokens_per_pack=10", "--include", "mean", "per_tok", *flags]
    return script("embed", "--esm-model", model, "--input", SOME_PROTEINS, *own)


def longest() -> list[str]:
    """Return the ids, longest sequence first: the order of the plan."""
    return [
        header.split()[0] for header, _ in sorted(fasta(SOME_PROTEINS), key=lambda e: -len(e[1]))
    ]


def test_vectors_are_those_of_one_pack_at_a_time(
    script: Script, place: Place, small_model: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed(script, small_model).status == 0
    assert steps.seen[:5] == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2"]
    assert steps.seen[-2:] == ["collect 14", "collect 15"]
    one_pack_on_way(monkeypatch, ahead=0)
    steps.seen.clear()
    assert embed(script, small_model).status == 0
    assert steps.seen[:4] == ["launch 1", "collect 1", "launch 2", "collect 2"]
    one, other = (read_run(place.output / f"run-00000{run}") for run in (1, 2))
    assert len(one) == 15
    np.testing.assert_equal(one, other)


def records_done(script: Script) -> int:
    (run,) = script("history", "--json").json
    return int(run["records_done"])


def test_a_signal_commits_what_was_launched(
    script: Script, place: Place, small_model: Path, steps: Steps
) -> None:
    def signalled(step: str) -> None:
        if step == "launch 4":
            os.kill(os.getpid(), signal.SIGTERM)

    steps.before = signalled
    assert embed(script, small_model).status == 143
    assert records_done(script) == 4
    steps.before = lambda step: None
    assert script("resume", "--run", "1").status == 0
    assert len(read_run(place.output / "run-000001")) == 15


def test_a_pack_that_cannot_be_launched_does_not_take_the_one_before_it(
    script: Script, small_model: Path, steps: Steps
) -> None:
    def failing(step: str) -> None:
        if step == "launch 4":
            raise MachineError("no memory")

    steps.before = failing
    answer = embed(script, small_model)
    assert (answer.status, answer.error) == (4, "no memory")
    assert records_done(script) == 3


def test_a_pack_that_is_not_finite_does_not_take_the_one_before_it(
    script: Script, small_model: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = pooling.mean

    def spoiled(hidden: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
        third = steps.seen[-1] == "launch 3"
        return true(hidden, groups) * (torch.nan if third else 1)

    monkeypatch.setattr(pooling, "mean", spoiled)
    answer = embed(script, small_model)
    assert answer.status == 2
    assert f"({longest()[2]}): non-finite value in mean of layer 2" in answer.error
    assert records_done(script) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_changes_mid_run_takes_nothing_that_is_finished(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(inventories, "WINDOW_RECORDS", 5)
    content = SOME_PROTEINS.read_bytes()
    path = place.folder / "changing.fasta"
    path.write_bytes(content)
    true = loading.load_model

    def load_model(*arguments: Any) -> loading.LoadedModel:  # noqa: ANN401
        path.write_bytes(content.rstrip() + b"M\n")
        return true(*arguments)

    monkeypatch.setattr("lib.jobs.computing.load_model", load_model)
    flags = ["--set", "compute.tokens_per_pack=10", "--set", f"compute.threads={threads}"]
    answer = script("embed", "--esm-model", small_model, "--input", path, *flags)
    assert (answer.status, answer.error) == (2, f"{path}: changed while it was being read")
    assert records_done(script) == 10
    monkeypatch.undo()
    monkeypatch.setattr(inventories, "WINDOW_RECORDS", 5)
    path.write_bytes(content)
    assert script("resume", "--run", "1", "--config", place.config).status == 0
    assert len(read_run(place.output / "run-000001")) == 15


# ---- Two packs at once


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def loaded(path: Path, precision: str = "float32") -> Network:
    found = detect(load_settings(overrides={"model.esm_model": str(path)}).model)
    return load_network(found, torch.device("cpu"), getattr(torch, precision))


def packs_of(*lengths: int) -> list[Pack]:
    """Return packs of one sequence each."""
    return [
        Pack(range(i, i + 1), [FastaSequence(b"M" * length, [Owner(i, f"p{i}", "", length, "")])])
        for i, length in enumerate(lengths)
    ]


class Forwards:
    """What goes through the network: when a sequence begins and ends, and on how many threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.threads: dict[int, int] = {}
        self.after: dict[int, tuple[str, int]] = {}  # what a sequence waits for as it begins
        self._changed = threading.Condition()
        true = Network.forward

        def forward(
            network: Network,
            tokens: torch.Tensor,
            lengths: Sequence[int],
            *others: Any,  # noqa: ANN401
        ) -> Iterator[tuple[int, torch.Tensor]]:
            self.threads[lengths[0]] = torch.get_num_threads()
            self.happens("begins", lengths[0])
            if lengths[0] in self.after:
                self._wait_for(self.after[lengths[0]])
            yield from true(network, tokens, lengths, *others)
            self.happens("ends", lengths[0])

        monkeypatch.setattr(Network, "forward", forward)

    def happens(self, kind: str, residues: int) -> None:
        with self._changed:
            self.events.append((kind, residues))
            self._changed.notify_all()

    def _wait_for(self, event: tuple[str, int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: event in self.events, timeout=120)

    def place(self, kind: str, residues: int) -> int:
        return self.events.index((kind, residues))


@pytest.mark.usefixtures("two_threads")
def test_two_packs_are_computed_at_once_and_come_out_in_order(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(monkeypatch)
    forwards.after[9] = ("ends", 7)
    packs = packs_of(9, 8, 7, 6)
    found = list(computed(loaded(small_model), packs, [MEAN], "float32"))
    assert [pack for pack, _ in found] == packs
    assert forwards.place("ends", 7) < forwards.place("ends", 9)
    assert set(forwards.threads.values()) == {1}


def test_threads_that_cannot_be_halved_compute_one_pack_at_a_time(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    forwards = Forwards(monkeypatch)
    list(computed(loaded(small_model), packs_of(9, 8), [MEAN], "float32"))
    assert forwards.events == [("begins", 9), ("ends", 9), ("begins", 8), ("ends", 8)]
    assert forwards.threads == {9: 3, 8: 3}
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_long_sequence_has_all_threads_to_itself(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(monkeypatch)
    list(computed(loaded(small_model), packs_of(9, 3000, 8, 7), [MEAN], "float32"))
    assert forwards.threads == {9: 1, 3000: 2, 8: 1, 7: 1}
    assert forwards.events[:4] == [("begins", 9), ("ends", 9), ("begins", 3000), ("ends", 3000)]


@pytest.mark.usefixtures("two_threads")
def test_packs_that_do_not_fit_beside_each_other_go_one_after_the_other(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(monkeypatch)
    monkeypatch.setattr(pipeline, "available_bytes", lambda *_: pack_bytes(200, 64))
    list(computed(loaded(small_model), packs_of(100, 99, 98), [MEAN], "float32"))
    kinds = [kind for kind, _ in forwards.events]
    assert kinds == ["begins", "ends"] * 3


@pytest.mark.usefixtures("two_threads")
def test_a_protein_that_has_no_room_beside_another_is_computed_after_it(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, packs = loaded(small_model), packs_of(100, 99, 98)
    alone = list(computed(network, packs, [MEAN], "float32"))
    computing, forward, lock = 0, network.forward, threading.Lock()
    refused = threading.Event()

    def counted(*arguments: Any) -> Iterator[tuple[int, torch.Tensor]]:  # noqa: ANN401
        nonlocal computing
        with lock:
            computing += 1
        assert refused.wait(processes.MOST_SECONDS)  # the second pack, beside the first
        yield from forward(*arguments)
        with lock:
            computing -= 1

    def available(*_: object, **__: bool) -> int:
        if computing:
            refused.set()
        return 0 if computing else pack_bytes(200, 64)

    monkeypatch.setattr(network, "forward", counted)
    monkeypatch.setattr(vectors, "available_bytes", available)
    found = list(computed(network, packs, [MEAN], "float32"))
    assert [pack for pack, _ in found] == [pack for pack, _ in alone]
    for (_, one), (_, other) in zip(found, alone, strict=True):
        assert np.array_equal(one.columns[MEAN], other.columns[MEAN])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_which_pack_is_ready_first(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    network = loaded(small_model, precision)
    packs = packs_of(300, 200, 120, 60, 30)
    forwards = Forwards(monkeypatch)
    runs = []
    slow: dict[int, tuple[str, int]]
    for slow in ({}, {300: ("ends", 120)}, {60: ("ends", 30)}):
        forwards.events.clear()
        forwards.after = slow
        runs.append(list(computed(network, packs, [MEAN, VectorColumn("bos", 1)], "float32")))
    for other in runs[1:]:
        for (_, one), (_, again) in zip(runs[0], other, strict=True):
            np.testing.assert_equal(one.columns, again.columns)


@pytest.mark.usefixtures("two_threads")
def test_a_pack_that_fails_is_told_after_those_before_it(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(monkeypatch)
    forwards.after[9] = ("fails", 8)
    true = vectors.needed_bytes

    def much_for_the_second(
        network: Network, sequences: Sequence[FastaSequence], columns: Sequence[VectorColumn]
    ) -> int:
        if sequences[0].owners[0].id != "p1":
            return true(network, sequences, columns)
        forwards.happens("fails", 8)
        return 1 << 60

    monkeypatch.setattr(vectors, "needed_bytes", much_for_the_second)
    yielded = []
    with pytest.raises(MachineError, match=r"record 1 \(p1\): 8 residues need"):
        for pack, _ in computed(loaded(small_model), packs_of(9, 8, 7), [MEAN], "float32"):
            yielded.append(len(pack.sequences[0].residues))
    assert yielded == [9]


@pytest.mark.usefixtures("two_threads")
def test_after_a_stop_only_what_was_begun_is_yielded(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = Forwards(monkeypatch)
    forwards.after = {9: ("begins", 8), 8: ("begins", 9)}

    def stopped() -> bool:
        return len(forwards.events) >= 2

    yielded = []
    with pytest.raises(StoppedError):
        for pack, _ in computed(
            loaded(small_model), packs_of(9, 8, 7, 6), [MEAN], "float32", stopped
        ):
            yielded.append(len(pack.sequences[0].residues))
    assert yielded == [9, 8]
    assert {length for _, length in forwards.events} == {9, 8}


def pause_at_layers(gate: Path) -> None:
    """Pause at every layer of every pack, and tell when the packs are waited for at the end."""
    pool = "concurrent.futures.thread.ThreadPoolExecutor.shutdown"
    processes.at_call(pool, 0, partial(processes.say, "abandoned"))
    processes.stop_at("lib.network.esm2.Network._attention", 0, gate)


def test_a_second_sigint_abandons_packs_at_their_next_layer(
    place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--config", place.config]
    flags += ["--set", "compute.threads=2"]
    gate = place.folder / "gate"
    with processes.start("embed", *flags, prepare=partial(pause_at_layers, gate)) as process:
        for _ in range(2):  # a pack on each thread
            process.wait_for("reached")
        process.send_signal(signal.SIGINT)
        process.wait_for("received")
        process.send_signal(signal.SIGINT)
        process.wait_for("abandoned")
        gate.touch()
        answer = process.end()
    assert answer.status == 130
    assert answer.err.rstrip().endswith("error: SIGINT: interrupted")
    assert "reached" not in answer.err  # the second layer of neither pack has begun
