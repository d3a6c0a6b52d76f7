"""Crew: the workers of a run on a Ray cluster, started, compared with the driver, and replaced.

A worker is admitted once it has shown that it has the driver's libraries and the run's weights.
What differs is refused by name, and the others go on.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from sqlalchemy import Engine

from lib.errors import IdentityRefusedError, LedgerError, MachineError
from lib.files import disk_errors
from lib.jobs.actor import CONTROL, Actor
from lib.jobs.interruption import Interruption
from lib.jobs.loading import KnownModel, begin_config
from lib.jobs.messages import Failure, Greeting, Readiness, own_versions
from lib.jobs.ray_cluster import import_ray, machines, one_line, ray_errors, room
from lib.ledger.attempts import AttemptFacts
from lib.ledger.database import utc_now
from lib.ledger.identity import first_difference
from lib.ledger.workers import (
    NO_WORKER,
    WorkerFacts,
    add_worker,
    end_worker,
    name_device,
    see_workers,
)
from lib.models.detection import Detection
from lib.network.device import choose_pack, choose_precision, packs_at_once
from lib.settings import Settings
from schema.esm2_config import ESM2Config
from schema.settings import ClusterSettings, ComputeSettings

__all__ = ["Crew", "Member", "crew"]

# How long a run without any worker waits for one.
_ROOM_SECONDS = 60.0
_BETWEEN_LOOKS = 2.0
# Workers in a row that may be lost while they load their weights.
_LOST_AT_START = 3
# How long no worker is started on a machine after one was lost there that had not even greeted, as
# where Ray does not know the machine to be dead, or this program is missing. It doubles each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0


class _Pause:
    """When workers may be started again on a machine."""

    def __init__(self) -> None:
        self._seconds, self._until = _FIRST_PAUSE, 0.0

    def begin(self) -> None:
        """Start none from now on, for twice as long as the last time."""
        self._until = time.monotonic() + self._seconds
        self._seconds = min(2 * self._seconds, _LONGEST_PAUSE)

    @property
    def lasts(self) -> bool:
        return time.monotonic() < self._until


@dataclass(eq=False)
class Member:
    """A worker of the crew; `greeting` and `readiness` are what it has said of itself.

    node: the machine that it is on, as the cluster calls it. row: its number in the run database.
    folder_asked: whether it was asked if it sees the run's folder; sent: whether its files are
    sent, None until that is known. given: what it has been given to compute and has not answered;
    since: when it began the first of these. rate: cost that it computes in a second. failed: how
    many stretches one after another it could not begin. hung: it gets no more work, but may answer
    yet. gone: refused or lost. answer_awaited: whether it was asked if it lives and has not
    answered; seen_at: when it last did, until that is on record.
    """

    actor: Any
    started_at: str
    node: str
    greeting: Greeting | None = None
    readiness: Readiness | None = None
    admitted: bool = False
    row: int | None = None
    folder_asked: bool = False
    sent: bool | None = None
    given: list[Any] = field(default_factory=list)
    since: float = 0.0
    rate: float | None = None
    failed: int = 0
    hung: bool = False
    gone: bool = False
    outcome: str | None = None
    error: str | None = None
    refusal: LedgerError | None = None
    answer_awaited: bool = False
    seen_at: str | None = None

    def __str__(self) -> str:
        return str(self.greeting) if self.greeting else "a worker"


class Mailbox:
    """Answers of actors, handled one by one in the thread that asks for them.

    The main thread never waits within Ray: an exception that a signal's handler raises there is
    lost.
    """

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[tuple[Callable[[Future[Any]], None], Future[Any]]]
        self._arrived = queue.SimpleQueue()

    def expect(self, awaited: Any, handle: Callable[[Future[Any]], None]) -> None:  # noqa: ANN401
        """Have `handle` called with the result of a future, or of one of Ray's references."""
        future = awaited if isinstance(awaited, Future) else awaited.future()
        future.add_done_callback(lambda done: self._arrived.put((handle, done)))

    def handle_next(self, seconds: float) -> None:
        """Handle an answer, if one arrives within so many seconds."""
        with suppress(queue.Empty):
            handle, done = self._arrived.get(timeout=seconds)
            handle(done)


@contextmanager
def crew(
    settings: Settings,
    detection: Detection,
    sha256: str | None,
    where: str,
    interruption: Interruption,
    say: Callable[[str], None],
    later: bool = False,
) -> Iterator[tuple[KnownModel, Crew]]:
    """Start workers on the cluster that this process has joined, and yield when the first is ready.

    where: the cluster, in a few words. The digest of the driver's weights is taken meanwhile if
    `sha256` is not known. later: whether workers are started only when the crew is asked for them.
    Raises IdentityRefusedError if every worker has other weights, MachineError if none starts.
    """
    weights = detection.require_weights()
    kind, device_reason = _kind_of_device(settings.compute)
    device = torch.device(kind)
    precision, precision_reason = choose_precision(settings.compute, device)
    tokens, pack_reason = choose_pack(settings.compute, device)
    chosen = replace(settings.compute, precision=precision, tokens_per_pack=tokens)
    threads = _threads(settings, kind)
    digests = begin_config(detection, sha256)

    def config() -> ESM2Config:
        with disk_errors(weights.path):
            return digests()

    theirs = replace(
        settings,
        model=replace(settings.model, repr_layers=list(detection.repr_layers)),
        compute=replace(chosen, device=kind, threads=threads),
    )
    made = Crew(theirs, config, interruption, say)
    try:
        if later:
            facts = AttemptFacts(weights.path, kind, NO_WORKER, threads, tokens)
        else:
            made.wait_for_one()
            first = made.first
            facts = AttemptFacts(
                weights.path, kind, first.device_name, first.threads, tokens, first.attention
            )
        reasons = f"{device_reason}, {where}", precision_reason, pack_reason
        yield KnownModel(made.config, facts, replace(settings, compute=chosen), reasons), made
    finally:
        made.dismiss()


class Crew:
    """The workers that this process has on a cluster."""

    def __init__(
        self,
        settings: Settings,
        config: Callable[[], ESM2Config],
        interruption: Interruption,
        say: Callable[[str], None],
    ) -> None:
        """Start no worker yet; `tend` starts as many as there is room for.

        settings: what a worker loads; config: waits for the identity of the driver's weights.
        """
        self.mail = Mailbox()
        self.say = say
        self.members: list[Member] = []
        self.on_loss: Callable[[Member, str], None] = lambda _member, _fact: None
        self._settings = settings
        self._wait_for_config = config
        self._interruption = interruption
        self._versions = own_versions()
        self._lost_at_start = 0
        self._pauses = defaultdict[str, _Pause](_Pause)
        self._record: tuple[Engine, int] | None = None
        self._looked = -_BETWEEN_LOOKS
        self._alone_since: float | None = None  # no worker was asked for
        self._room_told = False
        self._fact = ""  # what became of the last worker that is gone

    @cached_property
    def config(self) -> ESM2Config:
        """The identity of the driver's weights; waits for their digest."""
        return self._wait_for_config()

    @property
    def at_once(self) -> int:
        """How many packs a device computes at once."""
        return packs_at_once(torch.device(self._settings.compute.device))

    @property
    def admitted(self) -> list[Member]:
        """The workers that may be given work."""
        return [one for one in self.members if one.admitted and not (one.hung or one.gone)]

    @property
    def first(self) -> Readiness:
        """What the first worker that may be given work has answered."""
        first = self.admitted[0].readiness
        assert first is not None
        return first

    def wait_for_one(self) -> None:
        """Return when a worker is admitted; raises what keeps all of them from it."""
        while not self.admitted:
            if self._interruption.insisted:
                raise self._interruption.error("interrupted")
            self.tend()
            self.mail.handle_next(_BETWEEN_LOOKS / 2)

    def tend(self) -> None:
        """Start workers where there is room for more; raise an error if there is no hope of one.

        Raises IdentityRefusedError if all were refused for that, MachineError else.
        """
        now = time.monotonic()
        if now - self._looked < _BETWEEN_LOOKS:
            return
        self._looked = now
        self._start_missing()
        alive = [one for one in self.members if not one.gone]
        if self._alone_since is None or any(one.greeting for one in alive):
            self._alone_since = now
            return
        refused = [one for one in self.members if one.outcome == "refused"]
        if not alive and refused:
            raise self._all_refused(refused)
        if self._lost_at_start >= _LOST_AT_START:
            raise MachineError(
                f"{self._lost_at_start} workers were lost at their start: {self._fact}"
            )
        if now - self._alone_since >= _ROOM_SECONDS:
            fact = f"; {self._fact}" if self._fact else ""
            raise MachineError(f"no worker within {_ROOM_SECONDS:.0f} s: {self._room()}{fact}")

    def open_record(self, engine: Engine, attempt_id: int) -> None:
        """Write workers into the run database from now on, and those that are there already."""
        self._record = engine, attempt_id
        for member in self.members:
            self._write(member)

    def close_record(self) -> None:
        """Record every worker that is still there as finished."""
        for member in self.admitted:
            self._write(member, "finished", None)
        self._record = None

    def refuse(self, member: Member, error: LedgerError) -> None:
        """Have a worker compute nothing for this run."""
        member.refusal = error
        self._fact = str(error)
        self._let_go(member, "refused", str(error))
        self.say(f"{member}: refused: {error}")

    def lose(self, member: Member, fact: str) -> None:
        """Give up a worker: it is killed if it still lives, and what it had is given to others."""
        if member.gone:
            return
        if member.greeting is None:
            self._pauses[member.node].begin()
        elif not member.admitted:
            self._lost_at_start += 1
        self._let_go(member, "lost", fact)
        if member.greeting is not None or fact != self._fact:
            self.say(f"{member}: lost: {fact}")
        self._fact = fact
        self.on_loss(member, fact)

    def suspend(self, member: Member, fact: str) -> None:
        """Give a worker no more work: it is recorded as lost, and may answer yet."""
        member.hung, member.outcome, member.error = True, "lost", fact
        self._fact = fact
        self._write(member)
        self.say(f"{member}: lost: {fact}")

    def release(self, member: Member) -> None:
        """End a worker that hangs."""
        if not member.gone:
            member.gone = True
            _kill(member)

    def beat(self) -> None:
        """Record which workers have answered since the last time, and ask again."""
        if self._record is None:
            return
        seen = dict[int, str]()
        for member in self.members:
            if member.row is not None and member.seen_at is not None:
                seen[member.row], member.seen_at = member.seen_at, None
            if member.admitted and not (member.gone or member.answer_awaited):
                member.answer_awaited = True
                with suppress(Exception):  # it is lost, which its other answers tell
                    answer = member.actor.answer.options(concurrency_group=CONTROL).remote()
                    self.mail.expect(answer, partial(self._seen, member))
        see_workers(self._record[0], seen)

    def _seen(self, member: Member, done: Future[None]) -> None:
        member.answer_awaited = False
        if done.exception() is None:
            member.seen_at = utc_now()

    def dismiss(self) -> None:
        """End every worker."""
        for member in self.members:
            if not member.gone:
                member.gone = True
                _kill(member)

    def stop(self) -> None:
        """Have every worker begin no pack any more."""
        for member in self.admitted:
            with suppress(Exception):  # it is lost, which its answers will tell
                member.actor.stop.options(concurrency_group=CONTROL).remote()

    # ---- Starting and admitting

    def _start_missing(self) -> None:
        """Start workers on the machines that have room, but not again where one was refused.

        Nor where one hung, as long as there are others.
        """
        places = [node for node in self._free() if not self._pauses[node].lasts]
        if self._lost_at_start >= _LOST_AT_START:
            return
        limit = self._settings.cluster.workers or len(self.members) + len(places)
        alive = sum(not one.gone for one in self.members)
        for node in places[: max(0, limit - alive)]:
            self.members.append(self._start(node))

    def _free(self) -> list[str]:
        """Return the machines where a worker can be started, each as often as there is room."""
        compute, cluster = self._settings.compute, self._settings.cluster
        there = room(compute.device, compute.threads)
        if cluster.workers > sum(there.values()) and not self._room_told:
            self._room_told = True
            self.say(f"[cluster] workers = {cluster.workers}: {self._room()}")
        others = bool(self.admitted)
        taken = Counter(
            one.node
            for one in self.members
            if not one.gone or one.outcome == "refused" or (one.hung and others)
        )
        free = {node: count - taken[node] for node, count in there.items()}
        # One on each machine, then another on each.
        deepest = max(free.values(), default=0)
        return [node for depth in range(deepest) for node in free if free[node] > depth]

    def _room(self) -> str:
        compute = self._settings.compute
        there = sum(room(compute.device, compute.threads).values())
        need = "1 GPU" if compute.device == "cuda" else f"{compute.threads} CPUs"
        return f"the cluster has room for {there} workers with {need} each"

    def _start(self, node: str) -> Member:
        ray, compute = import_ray(), self._settings.compute
        needs = {"num_gpus": 1} if compute.device == "cuda" else {"num_cpus": compute.threads}
        # What is lost is replaced and given to others here, never started again by Ray.
        kept = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {CONTROL: 1}}
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        with ray_errors():
            actor = ray.remote(**needs, **kept, scheduling_strategy=here)(Actor).remote()
            member = Member(actor, utc_now(), node)
            self.mail.expect(actor.greet.remote(), partial(self._greeted, member))
        return member

    def _greeted(self, member: Member, done: Future[Greeting]) -> None:
        if (greeting := self._result(member, done)) is None:
            return
        member.greeting = greeting
        self._pauses.pop(member.node, None)
        difference = _version_difference(self._versions, greeting.versions)
        if difference:
            name, ours, theirs = difference
            fact = f"{name} is {theirs} there, {ours} here"
            self.refuse(member, MachineError(fact))
            return
        self.mail.expect(member.actor.load.remote(self._settings), partial(self._loaded, member))

    def _loaded(self, member: Member, done: Future[Readiness | Failure]) -> None:
        if (said := self._result(member, done)) is None:
            return
        if isinstance(said, Failure):
            self.refuse(member, said.error())
            return
        member.readiness = said
        difference = self._identity_difference(said.config)
        if difference:
            key, ours, theirs = difference
            fact = f"{key} is {theirs} in {said.weights_path}, {ours} in the run"
            self.refuse(member, IdentityRefusedError(fact))
            return
        if said.device.partition(":")[0] != self._settings.compute.device:
            self.refuse(member, MachineError(f"its device is {said.device}"))
            return
        if self.admitted:
            theirs, ours = said.attention, self.first.attention
            if theirs != ours:
                fact = f"attention is {theirs} there, {ours} at the first worker"
                self.refuse(member, MachineError(fact))
                return
            self._compare_devices(member)
        member.admitted = True
        self._lost_at_start = 0
        self._write(member)

    def _result(self, member: Member, done: Future[Any]) -> Any:  # noqa: ANN401
        """Return what a worker answered, or None if it is lost."""
        if member.gone:
            return None
        try:
            return done.result()
        except Exception as error:  # Ray's own, or what the worker raised
            self.lose(member, one_line(error))
            return None

    def _identity_difference(self, found: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """Return (key, ours, theirs) of the first difference; the name may be another."""
        expected = {key: value for key, value in self.config.snapshot().items() if key != "name"}
        return first_difference(expected, {key: found.get(key, "absent") for key in expected})

    def _compare_devices(self, member: Member) -> None:
        """Say that a worker has another device than the first, whose last bits may differ."""
        assert member.readiness is not None
        ours, theirs = self.first.device_name, member.readiness.device_name
        if ours != theirs:
            self.say(f"{member}: its device is {theirs}, that of {self.admitted[0]} is {ours}")

    def _all_refused(self, refused: list[Member]) -> LedgerError:
        """Return what ends a run that has no worker; a difference in identity outranks others."""
        by_identity = [one for one in refused if isinstance(one.refusal, IdentityRefusedError)]
        first = (by_identity or refused)[0]
        kind = IdentityRefusedError if by_identity else type(first.refusal or MachineError(""))
        return kind(f"all {len(refused)} workers were refused: {first}: {first.refusal}")

    def _let_go(self, member: Member, outcome: str, error: str) -> None:
        member.gone, member.outcome, member.error = True, outcome, error
        _kill(member)
        self._write(member, outcome, error)

    # ---- On the record

    def _write(self, member: Member, outcome: str | None = None, error: str | None = None) -> None:
        """Write what is known of a worker that has greeted."""
        outcome, error = outcome or member.outcome, error or member.error
        if self._record is None or member.greeting is None:
            return
        engine, attempt_id = self._record
        if member.row is None:
            if not (member.admitted or member.gone):
                return
            facts = _facts(member)
            member.row = add_worker(engine, attempt_id, facts, member.started_at, outcome, error)
            if not member.gone:
                name_device(engine, attempt_id, self.first.device_name, self.first.threads)
        elif outcome is not None:
            end_worker(engine, member.row, outcome, error)


def _kind_of_device(compute: ComputeSettings) -> tuple[str, str]:
    """Return cuda or cpu, and why; Ray chooses which GPU a worker gets."""
    if compute.device != "auto":
        return compute.device.partition(":")[0], "as set"
    if any(room("cuda", 0).values()):
        return "cuda", "auto: the cluster has GPUs"
    return "cpu", "auto: no GPU in the cluster"


def _threads(settings: Settings, kind: str) -> int:
    """Return the CPU threads of a worker; at least 1 where CPUs compute."""
    cluster: ClusterSettings = settings.cluster
    threads = cluster.threads_per_worker or settings.compute.threads
    if threads or kind == "cuda":
        return threads
    counts = [one.get("CPU", 0) for one in machines().values()]
    return int(min((count for count in counts if count >= 1), default=1))


def _version_difference(
    ours: Mapping[str, str], theirs: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """Return (name, ours, theirs) of the first difference that can change a bit.

    The driver may have another build of torch than the workers, and Python another last number.
    """

    def compared(versions: Mapping[str, str]) -> dict[str, str]:
        python = ".".join(versions["python"].split(".")[:2])
        return {**versions, "python": python, "torch": versions["torch"].partition("+")[0]}

    return first_difference(compared(ours), compared(theirs))


def _facts(member: Member) -> WorkerFacts:
    greeting, ready = member.greeting, member.readiness
    assert greeting is not None
    facts = WorkerFacts(greeting.host, greeting.pid, greeting.node, greeting.versions)
    if ready is None:
        return facts
    return replace(
        facts,
        versions={**greeting.versions, "attention": ready.attention},
        device=ready.device,
        device_name=ready.device_name,
        threads=ready.threads,
        weights_path=ready.weights_path,
        weights_sha256=str(ready.config["sha256"]),
    )


def _kill(member: Member) -> None:
    with suppress(Exception):  # of an actor that has ended
        import_ray().kill(member.actor, no_restart=True)
