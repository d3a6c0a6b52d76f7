"""A Ray cluster: if this fails, several machines lose or mix up what one keeps.

The machines are nodes of one cluster on this machine, whose head computes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.conftest import UNIPROT_PART, Place, Script
from tests.processes import Process
from tests.ray_nodes import Nodes, control_server, nodes
from tests.reference import assert_same_bits

pytestmark = [
    pytest.mark.xdist_group("cluster"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

# Small packs, and one or two in a stretch; each run computes for itself.
QUICK = ["--set", "output.checkpoint_seconds=0", "--set", "compute.tokens_per_pack=450"]
QUICK += ["--set", "output.reuse=no"]
ALL = ["--include", "mean", "bos", "per_tok", "contacts"]

# What a node's Python does before all else: it takes one file for another, as a machine does where
# something else is mounted.
MOUNTED = """
import os
def elsewhere(true):
    def called(path, *rest, **named):
        return true({other!r} if str(path) == {ours!r} else path, *rest, **named)
    return called
os.open, os.stat = elsewhere(os.open), elsewhere(os.stat)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A head without CPUs; tests add the nodes that they need."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    with nodes(folder) as made, pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def lasting(cluster: Nodes) -> str:
    """A node that is there for all tests, as it takes long to start; workers on it may die."""
    return cluster.add()


def embed_flags(model: Path, *flags: str) -> list[str | Path]:
    return ["--esm-model", model, "--input", UNIPROT_PART, *QUICK, *flags]


def rows(place: Place, statement: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(place.database)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(statement)]


def listed(place: Place, run: int) -> set[str]:
    """Return the files that a run's checkpoints and lock are, by name."""
    paths = rows(place, f"SELECT path FROM checkpoints WHERE run_id = {run}")
    return {".lock", *(row["path"] for row in paths)}


def names(place: Place, run: int) -> set[str]:
    return {path.name for path in (place.output / f"run-{run:06d}").iterdir()}


def workers(place: Place) -> list[dict[str, Any]]:
    return rows(place, "SELECT * FROM workers ORDER BY id")


def started(place: Place, *argv: str | Path, prepare: processes.Work | None = None) -> Process:
    return processes.start("embed", *argv, "--config", place.config, prepare=prepare)


@pytest.fixture
def stranger(
    cluster: Nodes, tmp_path: Path, small_model: Path, other_model: Path
) -> Iterator[None]:
    """A node where other weights lie where ours do."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    program = MOUNTED.format(ours=str(small_model), other=str(other_model))
    (mounted / "sitecustomize.py").write_text(program)
    number = cluster.add(PYTHONPATH=f"{mounted}:{os.environ.get('PYTHONPATH', '')}")
    yield
    cluster.remove(number)


def troubled(gate: Path) -> None:
    """Lose a worker that goes on, damage a file that came back, and pause at the second commit."""
    processes.stop_at("lib.ledger.commit.rename_into_place", 2, gate)
    dispatch: Any = importlib.import_module("lib.jobs.dispatch")
    answered, received = dispatch._Dispatch._answered, dispatch._received
    # One stretch may be lost with each of the workers that are lost here.
    dispatch._TRIES = 6
    calls: list[str] = []

    def unavailable_once(self: Any, given: Any, done: Future[Any]) -> None:  # noqa: ANN401
        if not calls:
            from ray.exceptions import ActorUnavailableError

            assert done.result().packs
            done = Future()
            done.set_exception(ActorUnavailableError("cut off", None))
        calls.append("answered")
        answered(self, given, done)

    def damaged_once(path: Path, answer: Any) -> Any:  # noqa: ANN401
        if "damaged" not in calls:
            calls.append("damaged")
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        return received(path, answer)

    dispatch._Dispatch._answered, dispatch._received = unavailable_once, damaged_once


@pytest.mark.usefixtures("lasting", "stranger")
def test_a_stranger_is_refused_and_what_is_lost_or_damaged_is_computed_by_others(
    cluster: Nodes, script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_flags(small_model, *ALL)
    assert script("embed", *flags).status == 0
    lost = cluster.add()
    gate = place.folder / "gate"
    prepare = partial(troubled, gate)
    with started(place, *flags, "--ray", cluster.address, prepare=prepare) as process:
        said = process.wait_for("reached")
        cluster.remove(lost)
        for one in workers(place):
            if one["outcome"] is None:
                with contextlib.suppress(ProcessLookupError):  # it was on that node
                    os.kill(one["pid"], signal.SIGKILL)
        gate.touch()
        answer = process.end()
    said += answer.err
    assert answer.status == 0, said
    assert answer.out.startswith("run 2 finished: 59 records in ")  # nothing of Ray's before it
    assert answer.out.count("\n") == 1
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")
    assert names(place, 2) == listed(place, 2)

    (told,) = [line for line in said.splitlines() if ": refused: " in line]
    assert ": refused: sha256 is " in told
    assert f" in {small_model}, " in told
    assert "cut off" in said
    assert ", computed again" in said
    # Of a killed process Ray says that it died or, at first, that it is unavailable.
    assert len(re.findall(r": lost: Actor(?:Died|Unavailable)Error: ", said)) >= 2

    found = workers(place)
    assert {one["outcome"] for one in found} == {"finished", "lost", "refused"}
    model = json.loads(rows(place, "SELECT esm2_config FROM runs WHERE id = 2")[0]["esm2_config"])
    # One that was lost before it had told its digest has none, and has computed nothing.
    used = {one["weights_sha256"] for one in found if one["outcome"] != "refused"}
    assert used <= {model["sha256"], None}
    by = rows(place, "SELECT workers.* FROM checkpoints JOIN workers ON workers.id = worker_id")
    assert {one["weights_sha256"] for one in by} == {model["sha256"]}
    assert {one["outcome"] for one in by} <= {"finished", "lost"}


def both_work(gate: Path) -> None:
    """Begin with two workers, and pause when each of them has committed a stretch.

    It says "alone" when there is one. A file `seen` beside the gate says that a worker has
    answered at a heartbeat.
    """
    crew: Any = importlib.import_module("lib.jobs.crew").Crew
    commit: Any = importlib.import_module("lib.ledger.commit")
    embedding: Any = importlib.import_module("lib.jobs.embedding")
    embedding._HEARTBEAT_SECONDS = 0.0
    true, committed = commit._row, set[int]()

    def wait_for_both(self: Any) -> None:  # noqa: ANN401
        is_told = False
        while len(self.admitted) < 2:
            if self.admitted and not is_told:
                processes.say("alone")
                is_told = True
            self.tend()
            self.mail.handle_next(1.0)

    def row(ownership: Any, name: str, stretch: Any) -> Any:  # noqa: ANN401
        committed.add(stretch.worker_id)
        if len(committed) == 2 and not gate.exists():
            processes.pause(gate)
        return true(ownership, name, stretch)

    seen = crew._seen

    def is_seen(self: Any, member: Any, done: Future[None]) -> None:  # noqa: ANN401
        seen(self, member, done)
        if member.seen_at is not None:
            gate.with_name("seen").touch()

    crew.wait_for_one, crew._seen, commit._row = wait_for_both, is_seen, row
    receive = "lib.jobs.interruption.Interruption._receive"
    processes.at_call(receive, 0, partial(processes.say, "received"), after=True)


@pytest.mark.usefixtures("lasting")
def test_a_killed_driver_loses_nothing_and_a_signal_commits_what_is_begun(
    cluster: Nodes, script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_flags(small_model, "--include", "bos", "contacts")
    assert script("embed", *flags).status == 0
    on_cluster: list[str | Path] = ["--ray", cluster.address, "--set", "cluster.files=sent"]
    within_a_write = partial(processes.at_call, "lib.jobs.dispatch._digested", 4, processes.die)
    with started(place, *flags, *on_cluster, prepare=within_a_write) as process:
        assert process.end().status == -signal.SIGKILL
    assert any(name.endswith(".tmp") for name in names(place, 2))
    # Files are digested by another thread, so that some of the three before may not be committed.
    assert 2 <= len(listed(place, 2)) <= 4

    on_cluster += ["--config", place.config]
    reaching = partial(both_work, place.folder / "gate")
    with processes.start("resume", *on_cluster, prepare=reaching) as process:
        process.wait_for("alone")
        added = cluster.add()  # a run uses what joins its cluster
        process.wait_for("reached")
        process.send_signal(signal.SIGTERM)
        process.wait_for("received")
        (place.folder / "gate").touch()
        answer = process.end()
    cluster.remove(added)
    assert answer.status == 143, answer.err
    assert answer.error == "SIGTERM: run 2 interrupted, finished work committed (make resume RUN=2)"
    assert names(place, 2) == listed(place, 2)
    found = workers(place)
    assert [one["outcome"] for one in found] == ["lost", "finished", "finished"]
    by = rows(place, "SELECT DISTINCT worker_id FROM checkpoints WHERE run_id = 2 ORDER BY 1")
    assert [one["worker_id"] for one in by] == [one["id"] for one in found]
    assert (place.folder / "seen").exists()

    assert script("resume").status == 0
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")
    assert names(place, 2) == listed(place, 2)
    detail = script("history", "--run", "2", "--json").json
    assert [one["outcome"] for one in detail["attempts"]] == ["lost", "interrupted", "finished"]


def test_a_second_signal_ends_at_once_on_a_cluster_of_its_own(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    prepare = partial(processes.stop_at, "lib.jobs.dispatch._received", 2, place.folder / "gate")
    flags = embed_flags(small_model, "--ray", "auto", "--set", "cluster.workers=1")
    with started(place, *flags, prepare=prepare) as process:
        process.wait_for("reached")
        (worker,) = workers(place)
        urgency = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (worker["pid"], os.getpid())]
        assert urgency[0] == urgency[1]
        process.send_signal(signal.SIGINT)
        process.wait_for("received")
        process.send_signal(signal.SIGINT)
        answer = process.end()  # though the pause would have no end
    assert answer.status == 130
    assert answer.error == "SIGINT: interrupted"
    assert names(place, 1) == listed(place, 1)
    assert len(listed(place, 1)) == 2
    assert script("resume").status == 0


def test_a_cluster_is_joined_only_with_its_token(
    cluster: Nodes, place: Place, small_model: Path
) -> None:
    flags = embed_flags(small_model)
    home = {"HOME": str(place.folder)}
    answer = place.run("embed", *flags, RAY_AUTH_TOKEN="", **home)
    assert answer.status == 0  # nobody asks
    joining = [*flags, "--ray", cluster.address]
    answer = place.run("embed", *joining, RAY_AUTH_TOKEN="", **home)
    assert answer.status == 4
    assert answer.error == (
        "no token of the cluster: RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are not set, and "
        f"{place.folder}/.ray/auth_token is not there"
    )
    answer = place.run("embed", *joining, RAY_AUTH_TOKEN="0" * 64)
    assert answer.status == 4
    assert answer.error == f"Ray cluster {cluster.address}: refuses the token of this machine"


def test_a_cluster_that_asks_for_no_token_is_refused(
    tmp_path: Path, place: Place, small_model: Path
) -> None:
    folder = tmp_path / "head"
    folder.mkdir()
    with control_server(folder, RAY_AUTH_MODE="disabled") as address:
        flags = embed_flags(small_model, "--ray", address)
        answer = place.run("embed", *flags, RAY_AUTH_TOKEN="0" * 64)
    assert answer.status == 4
    fact = "asks for no token (RAY_AUTH_MODE=token)"
    assert answer.error == f"Ray cluster {address}: {fact}"


def test_without_ray_this_process_computes_and_a_cluster_is_refused(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert script("embed", *embed_flags(small_model)).status == 0
    answer = script("embed", *embed_flags(small_model), "--ray", "auto")
    assert (answer.status, answer.error) == (2, "[cluster] ray: ray is not installed")
    assert [
        one["worker_id"] for one in rows(place, "SELECT DISTINCT worker_id FROM checkpoints")
    ] == [None]
