"""Dispatch: if this fails, what goes wrong with one worker loses or repeats work of the run."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lib.errors import MachineError
from lib.jobs import dispatch
from lib.jobs.messages import Answer, Failure
from lib.jobs.patience import Patience
from lib.jobs.reuse import LostSourceError, SourceFiles
from tests.conftest import ROOT, UNIPROT_PART, Once, Place, Script
from tests.in_process_ray import ActorError, Handle, Hook, InProcessRay, installed
from tests.processes import Answer as Ended
from tests.reference import assert_same_bits, fasta, read_run, write_fasta

# Small packs, and one or two in a stretch; each run computes for itself.
QUICK = ["--set", "output.checkpoint_seconds=0", "--set", "compute.tokens_per_pack=450"]
QUICK += ["--set", "output.reuse=no"]
RECORDS = 30  # one of them is far longer than a window


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InProcessRay:
    """Ray in this process, on two machines with a CPU each."""
    return installed(monkeypatch)


class Runs:
    """The same run, here and on the cluster: of some 12 stretches if not of all records."""

    def __init__(
        self, script: Script, place: Place, model: Path, records: int | None = RECORDS
    ) -> None:
        self.script, self.place = script, place
        proteins = fasta(UNIPROT_PART)[:records]
        self.input = write_fasta(place.folder / "proteins.fasta", proteins)
        self._flags = ["--esm-model", model, "--input", self.input, *QUICK]

    def embed_here(self) -> None:
        assert self.script("embed", *self._flags).status == 0

    def embed(self, *flags: str) -> Ended:
        return self.script("embed", *self._flags, "--ray", "auto", *flags)

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.place.database)) as connection:
            return connection.execute(statement).fetchall()

    def check(self) -> None:
        """Compare run 2 with run 1, and its files with the database."""
        folder = self.place.output / "run-000002"
        assert_same_bits(folder, self.place.output / "run-000001")
        self.check_files()

    def check_files(self) -> None:
        listed = {path for (path,) in self.rows("SELECT path FROM checkpoints WHERE run_id = 2")}
        folder = self.place.output / "run-000002"
        assert {path.name for path in folder.iterdir()} == {".lock", *listed}

    def outcomes(self) -> list[str]:
        return [outcome for (outcome,) in self.rows("SELECT outcome FROM workers ORDER BY id")]


@pytest.fixture
def runs(script: Script, place: Place, small_model: Path, ray: InProcessRay, once: Once) -> Runs:
    made = Runs(script, place, small_model)
    once(made.embed_here)
    return made


@pytest.mark.parametrize("files", ["auto", "sent"])
def test_nothing_goes_wrong(runs: Runs, ray: InProcessRay, files: str) -> None:
    answer = runs.embed("--set", f"cluster.files={files}")
    assert answer.status == 0, answer.err
    runs.check()
    assert runs.outcomes() == ["finished", "finished"], answer.err
    history = runs.script("history", "--run", "2", "--json").json
    assert len(history["workers"]) == 2
    assert sum(one["residues"] for one in history["workers"]) == history["residues_done"]
    shown = runs.script("history", "--run", "2").out
    assert "\nworkers\n" in shown
    assert runs.script("validate", "--run", "2").status == 0
    page = runs.place.folder / "page.html"
    assert runs.script("report", "--run", "2", "--to", page).status == 0
    assert "<h2>Workers</h2>" in page.read_text()


def test_half_precision_long_sequences_and_every_column_are_as_on_one_machine(
    script: Script, place: Place, small_model: Path, ray: InProcessRay
) -> None:
    place.set("compute", "precision", "bfloat16")
    place.set("input", "long_sequences", "whole")
    place.set("output", "include", "mean bos per_tok contacts")
    place.set("output", "per_tok_dtype", "float16")
    place.set("model", "repr_layers", "0 -1")
    runs = Runs(script, place, small_model, records=None)
    runs.embed_here()
    answer = runs.embed()
    assert answer.status == 0, answer.err
    runs.check_files()
    here, there = (pq.read_table(place.output / f"run-00000{number}") for number in (1, 2))
    assert there.sort_by("record").equals(here.sort_by("record"))


def test_what_fails_on_three_workers_ends_the_run_with_its_line_and_the_rest_committed(
    runs: Runs, ray: InProcessRay
) -> None:
    def fails(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if packs[0].positions.start == 0:
            return Answer(0, failure=Failure.of(MachineError("record 1 (x): too long"))), None
        return true(order, packs)

    ray.hooks["compute"] = fails
    answer = runs.embed()
    assert answer.status == 4
    assert answer.error.startswith("positions 0 to 2 failed 3 times: worker ")
    assert answer.error.endswith("record 1 (x): too long")
    runs.check_files()
    ray.hooks.clear()
    assert runs.script("resume").status == 0
    runs.check()


@pytest.mark.parametrize(
    "says", [torch.AcceleratorError("CUDA error: uncorrectable ECC error"), MachineError("full")]
)
def test_what_fails_on_one_worker_is_left_to_the_others(
    runs: Runs, ray: InProcessRay, says: Exception
) -> None:
    """A broken GPU fails at once, and so is free again before any other worker is."""
    ray.machines = [{"CPU": 1.0}] * 3
    tried: list[int] = []

    def breaks(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if actor is not ray.actors[0]:
            time.sleep(0.1)
            return true(order, packs)
        tried.append(packs[0].positions.start)
        if len(tried) == 1:
            return true(order, packs)
        if isinstance(says, MachineError):
            return Answer(0, failure=Failure.of(says)), None
        raise says

    ray.hooks["compute"] = breaks
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert len(tried) == len(set(tried))  # it gets no stretch twice
    assert f": {says}\n" in answer.err
    runs.check()
    assert runs.outcomes().count("lost") == (
        isinstance(says, torch.AcceleratorError) or len(tried) > 3
    )


def test_a_worker_that_begins_nothing_is_ended_and_another_takes_its_place(
    runs: Runs, ray: InProcessRay
) -> None:
    ray.machines = [{"CPU": 1.0}]
    failed: list[int] = []

    def fails(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if actor is not ray.actors[0]:
            return true(order, packs)
        failed.append(packs[0].positions.start)
        return Answer(0, failure=Failure.of(MachineError("no memory"))), None

    ray.hooks["compute"] = fails
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert len(failed) in (3, 4)  # it has two at a time
    assert "lost: failed 3 times in a row: no memory" in answer.err
    assert runs.outcomes() == ["lost", "finished"]
    runs.check()


def test_a_value_that_is_not_finite_ends_the_run_and_names_the_record(
    runs: Runs, ray: InProcessRay
) -> None:
    def fails(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        answer, content = true(order, packs[:1])
        if packs[0].positions.start < 10:
            return answer, content
        return replace(answer, failure=Failure("NonFiniteError", "record 7 (y): NaN")), content

    ray.hooks["compute"] = fails
    answer = runs.embed()
    assert (answer.status, answer.error) == (2, "record 7 (y): NaN")
    runs.check_files()
    assert runs.rows("SELECT status FROM runs WHERE id = 2") == [("failed",)]
    ray.hooks.clear()
    assert runs.script("resume").status == 0
    runs.check()


def test_what_a_worker_has_not_ended_another_does(runs: Runs, ray: InProcessRay) -> None:
    def half(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        answer, content = true(order, packs[:1])
        return answer, content

    ray.hooks["compute"] = half
    answer = runs.embed()
    assert answer.status == 0, answer.err
    runs.check()


def test_what_a_worker_writes_that_was_given_up_is_never_taken(
    runs: Runs, ray: InProcessRay
) -> None:
    late = threading.Event()

    def unreachable(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if actor is ray.actors[0] and not late.is_set():
            late.set()
            true(order, packs)
            raise ActorError("cannot be reached")
        return true(order, packs)

    ray.hooks["compute"] = unreachable
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert "lost: ActorError: cannot be reached" in answer.err
    assert set(runs.outcomes()) == {"lost", "finished"}
    runs.check()


# ---- Workers that hang


class Hanging:
    """A worker that hangs on one stretch, and a clock that only goes while no other computes.

    It writes its file and answers when it is killed, or, if it `may_end`, when another has written
    that of the stretch, which answers once the driver has `taken` this one's. begun: the actors
    that began it. first: its position.
    """

    def __init__(self, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[Handle] = []
        self.may_end, self.written, self.taken = (threading.Event() for _ in range(3))
        self.first = -1
        self._lock, self._busy, self._idle, self._clock = threading.Lock(), 0, 0, 0.0
        monkeypatch.setattr("lib.jobs.patience.monotonic", self.monotonic)
        answered_late = dispatch._Dispatch._answered_late

        def take(*arguments: Any) -> None:  # noqa: ANN401
            answered_late(*arguments)
            self.taken.set()

        monkeypatch.setattr(dispatch._Dispatch, "_answered_late", take)
        ray.hooks["compute"] = self.compute

    def monotonic(self) -> float:
        self._idle = self._idle + 1 if self.begun and not self._busy else 0
        if self._idle > 20:  # not between two stretches of another
            self._clock += 10.0
        return self._clock

    def compute(self, actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        first = packs[0].positions.start
        with self._lock:
            # Not the very first, before which nobody knows how long one takes.
            if self.first < 0 and first > 8:
                self.first = first
            if first == self.first:
                self.begun.append(actor)
                hangs = len(self.begun) == 1
            else:
                hangs = False
            self._busy += not hangs
        try:
            done = true(order, packs)
            if first == self.first and not hangs and self.may_end.is_set():
                self.written.set()
                assert self.taken.wait(20)
            end = time.monotonic() + 20  # if nobody notices
            while hangs and not actor.killed and time.monotonic() < end:
                if self.may_end.is_set() and self.written.is_set():
                    break
                time.sleep(0.01)
            return done
        finally:
            with self._lock:
                self._busy -= not hangs


@pytest.mark.parametrize("files", ["shared", "sent"])
def test_what_a_worker_hangs_on_another_does(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    hanging = Hanging(ray, monkeypatch)
    answer = runs.embed("--set", f"cluster.files={files}")
    assert answer.status == 0, answer.err
    assert len(re.findall(r"worker \d+ on \S+: lost: no answer in 6\d\d s", answer.err)) == 1
    assert len({*hanging.begun}) == len(hanging.begun) == 2
    assert len(ray.actors) == 2  # none was started in its place
    runs.check()
    found = runs.rows("SELECT outcome, error LIKE 'no answer in %' FROM workers ORDER BY outcome")
    assert found == [("finished", None), ("lost", 1)]


def test_what_a_worker_hangs_on_is_taken_if_it_comes_first(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(ray, monkeypatch)
    hanging.may_end.set()
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert len({*hanging.begun}) == len(hanging.begun) == 2
    assert ": lost: no answer in 6" in answer.err
    runs.check()
    taken = "SELECT outcome FROM checkpoints JOIN workers ON workers.id = worker_id"
    first = f"{taken} WHERE first_position = {hanging.first}"
    assert runs.rows(first) == [("lost",)]


def test_a_worker_that_hangs_alone_is_replaced(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.machines = [{"CPU": 1.0}]
    hanging = Hanging(ray, monkeypatch)
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert hanging.begun == ray.actors
    assert ray.actors[0].killed
    assert runs.outcomes() == ["lost", "finished"]
    runs.check()


def test_what_a_worker_writes_while_it_ends_is_removed(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, closed = Hanging(ray, monkeypatch), threading.Event()
    true_close = dispatch._Dispatch.close
    written: list[Path] = []

    def close(self: dispatch._Dispatch) -> set[Path]:
        unneeded = true_close(self)
        closed.set()
        return unneeded

    def compute(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        answer, content = hanging.compute(actor, true, order, packs)
        if hanging.begun and actor is hanging.begun[0] and actor.killed:
            assert closed.wait(20)
            written.append(order.rules.folder / answer.name)
            written[0].write_bytes(b"late")
        return answer, content

    monkeypatch.setattr(dispatch._Dispatch, "close", close)
    ray.hooks["compute"] = compute
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert len(written) == 1
    runs.check()


def test_a_signal_does_not_wait_for_a_worker_that_hangs(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(ray, monkeypatch)
    interrupted: list[int] = []

    def compute(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if packs[0].positions.start > 8 and not interrupted:
            interrupted.append(packs[0].positions.start)
            os.kill(os.getpid(), signal.SIGTERM)
        return hanging.compute(actor, true, order, packs)

    ray.hooks["compute"] = compute
    answer = runs.embed()
    assert answer.status == 143, answer.err
    assert ": lost: no answer in 6" in answer.err
    assert len(hanging.begun) == 1
    runs.check_files()
    ray.hooks.clear()
    assert runs.script("resume").status == 0
    runs.check()


def test_a_driver_that_was_stopped_takes_no_worker_for_hung(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    monkeypatch.setattr("lib.jobs.patience.monotonic", lambda: clock)

    def hours_later(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        nonlocal clock
        if packs[0].positions.start > 8 and not clock:
            clock += 10_000.0
            time.sleep(0.3)
        return true(order, packs)

    ray.hooks["compute"] = hours_later
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert (clock, runs.outcomes()) == (10_000.0, ["finished", "finished"])


@pytest.mark.parametrize(
    ("slowest", "most"), [(None, math.inf), (0.0, 600.0), (0.5, 600.0), (2.0, 2000.0)]
)
def test_a_worker_hangs_after_ten_times_what_the_slowest_took(
    slowest: float | None, most: float
) -> None:
    patience = Patience()
    if slowest is not None:
        patience.learn(30 * slowest, 30.0)
        patience.learn(0.0, 20.0)
    assert patience.most_seconds(100.0) == most


def test_workers_are_seen_at_the_heartbeats(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.jobs.embedding._HEARTBEAT_SECONDS", 0.0)
    seen: list[str] = []

    def slow(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if actor is ray.actors[0] and not seen:
            seen.append(seen_at())  # perhaps never yet
            ends = time.monotonic() + 60  # a minute without a heartbeat is none
            while len(seen) < 3 and time.monotonic() < ends:
                time.sleep(0.01)
                if seen_at() != seen[-1]:
                    seen.append(seen_at())
        return true(order, packs)

    def seen_at() -> str:
        ((first,), *_) = runs.rows("SELECT seen_at FROM workers ORDER BY id")
        return str(first)

    def silent(actor: Handle, true: Any) -> None:  # noqa: ANN401
        if actor is not ray.actors[0]:
            raise ActorError("silent")
        true()

    # The first answers while it computes, the other one only by what it has computed.
    ray.hooks |= {"compute": slow, "answer": silent}
    answer = runs.embed()
    assert answer.status == 0, answer.err
    _, before, after = seen
    assert before < after
    assert runs.outcomes() == ["finished", "finished"]
    runs.check()


@pytest.mark.parametrize("files", ["shared", "sent"])
def test_a_file_that_came_back_damaged_is_computed_again(
    runs: Runs, ray: InProcessRay, files: str
) -> None:
    damaged: list[str] = []

    def damage(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        answer, content = true(order, packs)
        if not damaged:
            damaged.append(answer.name)
            if content is None:
                (order.rules.folder / answer.name).write_bytes(b"damaged")
            else:
                content = np.zeros_like(content)
        return answer, content

    ray.hooks["compute"] = damage
    answer = runs.embed("--set", f"cluster.files={files}")
    assert answer.status == 0, answer.err
    assert f"{damaged[0]}: " in answer.err
    assert ", computed again" in answer.err
    runs.check()


def test_a_folder_that_a_worker_does_not_see_has_its_files_sent_or_the_worker_refused(
    runs: Runs, ray: InProcessRay
) -> None:
    def not_there(actor: Handle, true: Any, nonce: Path, copy: Path) -> Any:  # noqa: ANN401
        return true(nonce, copy) if actor in ray.actors[::2] else f"{nonce}: No such file"

    ray.hooks["copy_nonce"] = not_there
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert "/run-000002, its files are sent" in answer.err
    runs.check()
    answer = runs.embed("--set", "cluster.files=shared")
    assert answer.status == 0, answer.err
    assert "refused: the run's folder is not shared: " in answer.err


def test_a_worker_that_computes_attention_in_another_way_is_refused(
    runs: Runs, ray: InProcessRay
) -> None:
    def another(actor: Handle, true: Any, settings: Any) -> Any:  # noqa: ANN401
        ready = true(settings)
        return replace(ready, attention="by hand") if actor is ray.actors[0] else ready

    ray.hooks["load"] = another
    answer = runs.embed()
    assert answer.status == 0, answer.err
    (ways,) = re.findall(r"refused: attention is (.*) at the first worker", answer.err)
    assert "by hand" in ways.split(" there, ")
    how = "SELECT DISTINCT versions ->> 'attention' FROM workers WHERE outcome = 'finished'"
    assert runs.rows(how) == runs.rows("SELECT versions ->> 'attention' FROM attempts WHERE id = 2")


def test_a_worker_with_another_version_of_torch_is_refused(
    runs: Runs, ray: InProcessRay, tmp_path: Path
) -> None:
    # Its versions are those that a Python finds which has another torch before ours.
    metadata = tmp_path / "torch-2.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    program = "import json, lib.jobs.messages as m; print(json.dumps(m.own_versions()))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    said = json.loads(subprocess.check_output([sys.executable, "-c", program], env=environment))

    def another(actor: Handle, true: Any) -> Any:  # noqa: ANN401
        greeting = true()
        return replace(greeting, versions=said) if actor is ray.actors[0] else greeting

    ray.hooks["greet"] = another
    answer = runs.embed()
    assert answer.status == 0, answer.err
    (told,) = [line for line in answer.err.splitlines() if ": refused: " in line]
    ours = version("torch").partition("+")[0]
    assert told.endswith(f": refused: torch is 2.0.0 there, {ours} here")
    assert sorted(runs.outcomes()) == ["finished", "refused"]
    runs.check()


def test_workers_that_are_lost_before_they_are_ready_end_in_one_line(
    runs: Runs, ray: InProcessRay
) -> None:
    def dies(_: Handle, true: Any, settings: Any) -> Any:  # noqa: ANN401
        raise ActorError("died of it")

    ray.hooks["load"] = dies
    answer = runs.embed()
    assert answer.status == 4
    assert answer.error.endswith(" workers were lost at their start: ActorError: died of it")
    assert runs.rows("SELECT count(*) FROM runs") == [(1,)]


def test_a_signal_commits_what_is_begun(runs: Runs, ray: InProcessRay) -> None:
    begun = threading.Event()

    def interrupted(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if packs[0].positions.start > 8 and not begun.is_set():
            begun.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return true(order, packs)

    ray.hooks["compute"] = interrupted
    answer = runs.embed()
    assert answer.status == 143, answer.err
    assert answer.error == "SIGTERM: run 2 interrupted, finished work committed (make resume RUN=2)"
    runs.check_files()
    assert runs.outcomes() == ["finished", "finished"]
    assert runs.script("resume").status == 0
    runs.check()


def test_an_address_where_nobody_listens_is_one_line(
    script: Script, small_model: Path, ray: InProcessRay
) -> None:
    flags = ["--esm-model", small_model, "--input", UNIPROT_PART]
    answer = script("embed", *flags, "--ray", "127.0.0.1:1")
    assert answer.status == 4
    fact = f"[Errno {errno.ECONNREFUSED}] Connection refused"
    assert answer.error == f"Ray cluster 127.0.0.1:1: {fact}"


@pytest.mark.parametrize("address", ["head..cluster:6379", "localhost:99999"])
def test_an_address_that_cannot_be_is_one_line(
    script: Script, small_model: Path, ray: InProcessRay, address: str
) -> None:
    flags = ["--esm-model", small_model, "--input", UNIPROT_PART]
    answer = script("embed", *flags, "--ray", address)
    assert answer.status == 4
    assert answer.error.startswith(f"Ray cluster {address}: ")


def is_ended() -> None:
    signal.raise_signal(signal.SIGTERM)


def loses_the_exception() -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
    raise RuntimeError("the raylet has died")


def loses_it_and_goes_on() -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("start", [is_ended, loses_the_exception, loses_it_and_goes_on])
def test_a_signal_while_ray_starts_is_no_failure_of_ray(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch, start: Callable[[], None]
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: start())
    answer = runs.embed()
    assert (answer.status, answer.error) == (143, "SIGTERM: interrupted")


def test_where_the_cluster_has_gpus_a_worker_has_one(runs: Runs, ray: InProcessRay) -> None:
    ray.machines = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}]
    runs.place.set("compute", "device", "auto")
    answer = runs.embed()
    assert answer.status == 4
    assert answer.error.startswith("all 2 workers were refused: worker ")
    assert answer.error.endswith(": device cuda: torch sees 0 CUDA devices")


def lost_once_on(ray: InProcessRay, machine: str) -> Hook:
    """Return a `compute` that loses the first worker of a machine.

    The others wait until there is another in its place.
    """

    def compute(actor: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        if ray.placed.index(machine) == ray.actors.index(actor):
            raise ActorError("gone")
        ends = time.monotonic() + 20  # if it is never replaced
        while ray.placed.count(machine) < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        return true(order, packs)

    return compute


def assert_only_the_other_is_replaced(runs: Runs, ray: InProcessRay) -> None:
    """Lose a worker of machine 1; machine 0, where none is of use, gets no second one."""
    ray.machines = [{"CPU": 1.0}] * 3
    ray.hooks["compute"] = lost_once_on(ray, "1")
    answer = runs.embed()
    assert answer.status == 0, answer.err
    assert ray.placed.count("0") == 1
    assert ray.placed.count("1") == 2
    runs.check()


def test_no_worker_is_started_again_where_one_was_refused(runs: Runs, ray: InProcessRay) -> None:
    def stranger(actor: Handle, true: Any, settings: Any) -> Any:  # noqa: ANN401
        ready = true(settings)
        if ray.placed[ray.actors.index(actor)] != "0":
            return ready
        return replace(ready, config={**ready.config, "sha256": "0" * 64})

    ray.hooks["load"] = stranger
    assert_only_the_other_is_replaced(runs, ray)


def test_a_machine_that_answers_nothing_keeps_no_worker_from_the_others(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.jobs.crew._FIRST_PAUSE", 60.0)

    def dead(actor: Handle, true: Any) -> Any:  # noqa: ANN401
        if ray.placed[ray.actors.index(actor)] == "0":
            raise ActorError("no such machine")
        return true()

    ray.hooks["greet"] = dead
    assert_only_the_other_is_replaced(runs, ray)


def test_a_cluster_without_what_a_worker_needs_is_told_in_a_line(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.jobs.crew._ROOM_SECONDS", 0.1)
    answer = runs.embed("--set", "compute.device=cuda")
    assert answer.status == 4
    fact = "the cluster has room for 0 workers with 1 GPU each"
    assert answer.error == f"no worker within 0 s: {fact}"
    assert runs.rows("SELECT count(*) FROM runs") == [(1,)]


def test_if_every_worker_has_other_weights_nothing_is_computed(
    runs: Runs, ray: InProcessRay
) -> None:
    def others(_: Handle, true: Any, settings: Any) -> Any:  # noqa: ANN401
        ready = true(settings)
        return replace(ready, config={**ready.config, "sha256": "0" * 64})

    ray.hooks["load"] = others
    answer = runs.embed()
    assert answer.status == 3
    assert answer.error.startswith("all 2 workers were refused: worker ")
    assert f": sha256 is {'0' * 64} in " in answer.error
    assert runs.rows("SELECT count(*) FROM runs") == [(1,)]


def test_more_workers_than_there_is_room_for_are_told(runs: Runs, ray: InProcessRay) -> None:
    answer = runs.embed("--set", "cluster.workers=9")
    assert answer.status == 0, answer.err
    fact = "[cluster] workers = 9: the cluster has room for 2 workers with 1 CPUs each"
    assert fact in answer.err.splitlines()
    assert len(ray.actors) == 2


def test_a_run_is_resumed_where_config_and_flags_say_now(runs: Runs, ray: InProcessRay) -> None:
    def fails(_: Handle, true: Any, order: Any, packs: Any) -> Any:  # noqa: ANN401
        raise ActorError("gone")

    ray.hooks["compute"] = fails
    assert runs.embed().status == 4
    ray.hooks.clear()
    started = len(ray.actors)
    answer = runs.script("resume", "--ray", "auto")
    assert answer.status == 0, answer.err
    assert len(ray.actors) == started + 2
    runs.check()


def test_what_an_earlier_run_has_is_copied_and_workers_compute_the_rest(
    runs: Runs, ray: InProcessRay, small_model: Path
) -> None:
    half = write_fasta(runs.place.folder / "half.fasta", fasta(runs.input)[::2])
    flags = ["--esm-model", small_model, *QUICK, "--input"]
    assert runs.script("embed", *flags, half).status == 0
    reusing = [*flags, runs.input, "--set", "output.reuse=yes"]
    with closing(sqlite3.connect(runs.place.database)) as connection, connection:
        connection.execute("UPDATE runs SET precision = 'none' WHERE id = 1")  # not copied from
    answer = runs.script("embed", *reusing, "--ray", "auto")
    assert answer.status == 0, answer.err
    copied = runs.rows("SELECT sum(records) FROM checkpoints WHERE reused_run_id = 2")
    assert copied == [(RECORDS // 2,)]
    by_workers = "SELECT sum(records) FROM checkpoints WHERE run_id = 3 AND worker_id IS NOT NULL"
    assert runs.rows(by_workers) == [(RECORDS // 2,)]
    found, expected = (read_run(runs.place.output / f"run-00000{number}") for number in (3, 1))
    for record, row in found.items():
        assert np.allclose(row["mean_2"], expected[record]["mean_2"], atol=1e-6)


def test_no_worker_is_started_before_there_is_something_to_compute(
    runs: Runs, ray: InProcessRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = runs.embed("--set", "output.reuse=yes")
    assert answer.status == 0, answer.err
    assert ray.actors == []
    assert_same_bits(runs.place.output / "run-000002", runs.place.output / "run-000001")
    device = "SELECT device_name = 'no worker' FROM attempts WHERE run_id > 1"
    assert runs.rows(device) == [(1,)]

    def gone(*_: object) -> object:
        raise LostSourceError("gone after it was planned to be copied")

    monkeypatch.setattr(SourceFiles, "verified", gone)
    answer = runs.embed("--set", "output.reuse=yes")
    assert answer.status == 0, answer.err
    assert len(ray.actors) == 2
    assert runs.rows(device) == [(1,), (0,)]
    assert runs.rows("SELECT status FROM runs") == [("finished",)] * 3
