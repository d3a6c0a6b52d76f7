"""Dispatch: stretches are given to workers, and what comes back is verified for the commit.

Every worker has one stretch that it computes and one that waits, which bounds memory and keeps
workers busy. Each time a stretch is given its file gets a new name, so that what a worker writes
that was given up is never taken for somebody else's work. What a worker hangs on is given to
another, too: the first that answers is taken.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.errors import InputError, LedgerError, MachineError
from lib.files import disk_errors
from lib.jobs.crew import Crew, Member
from lib.jobs.division import Division, SizeRules, Stretch
from lib.jobs.embedding import Job, Pulse, lengths_left
from lib.jobs.loading import beside
from lib.jobs.messages import Answer, Failure
from lib.jobs.patience import Patience
from lib.jobs.progress import computing_cost
from lib.jobs.ray_cluster import import_ray, one_line, ray_errors
from lib.jobs.stretches import StretchRules
from lib.jobs.worker import Order
from lib.ledger.checkpoints import FinishedFile, FinishedStretch, temporary_name
from lib.ledger.database import utc_now
from lib.ledger.identity import run_config
from lib.network.pipeline import StoppedError
from lib.sequences.plan import Pack
from schema.parquet import vector_columns

__all__ = ["Workers"]

_GIVEN = 2  # stretches that a worker has: one computed, one waiting
_TRIES = 3  # how often a stretch may fail, and how many one after another a worker
_TAKEN_AT_ONCE = 4  # files that are fetched or verified at once, each by a thread
_BETWEEN_LOOKS = 1.0


class Workers:
    """What computes a run on a cluster: a `Computer` whose stretches come in any order."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._unneeded: set[Path] = set()

    @property
    def at_once(self) -> int:
        """How many packs the device of a worker computes at once."""
        return self._crew.at_once

    @property
    def reports_at_once(self) -> int:
        """How many workers report at about the same time."""
        return max(1, len(self._crew.admitted))

    def make_ready(self) -> None:
        """Wait for a worker."""
        self._crew.wait_for_one()

    def make_room(self) -> None:
        """Free nothing: networks are in the processes of workers."""

    def stretches(
        self, job: Job, packs: Iterator[Pack], rules: StretchRules, pulse: Pulse
    ) -> Generator[FinishedStretch]:
        """Yield stretches as workers finish them."""
        dispatch = _Dispatch(self._crew, job, packs, rules, pulse)
        self._crew.open_record(job.engine, job.ownership.attempt_id)
        try:
            yield from dispatch.run()
        finally:
            with suppress(MachineError):  # the database has been reported already
                self._crew.close_record()
            self._unneeded |= dispatch.close()

    def remove_unneeded(self) -> None:
        """Remove files that nobody waits for, again: a worker may have written while it ended."""
        _remove(self._unneeded)


@dataclass(eq=False)
class _Task:
    """A stretch that has to be computed; packs: Ray's reference to them.

    failed_on: the worker of each try that failed.
    """

    stretch: Stretch
    packs: Any
    failed_on: list[Member]


@dataclass(eq=False)
class _Given:
    """A task in the hands of a worker.

    path: the temporary name of its file in the run's folder. content: Ray's reference to the bytes
    of a file that is sent. unneeded: another worker has answered with the same stretch before.
    """

    task: _Task
    member: Member
    path: Path
    content: Any
    unneeded: bool = False


class _Dispatch:
    """The work on one run: what is given to whom, what came back, and what has to be done again."""

    def __init__(
        self, crew: Crew, job: Job, packs: Iterator[Pack], rules: StretchRules, pulse: Pulse
    ) -> None:
        self._crew, self._job, self._rules, self._pulse = crew, job, rules, pulse
        run = job.ownership.run
        self._columns = vector_columns(run.include, run.repr_layers)
        self._per_tok_dtype = run.per_tok_dtype
        width = run_config(run).hidden_dim
        self._cost_of = partial(_cost_of, hidden_dim=width)
        cost = sum(computing_cost(lengths, width) for lengths in lengths_left(job))
        sizes = SizeRules(rules.seconds, rules.records, crew.at_once, self._columns, width)
        self._division = Division(packs, sizes, self._cost_of, cost)
        self._exhausted = False
        self._again: deque[_Task] = deque()
        self._to_take: deque[tuple[_Given, Answer]] = deque()
        self._taking = 0
        self._finished: deque[tuple[FinishedStretch, list[int]]] = deque()
        self._ending: Exception | None = None
        self._unnamed: set[Path] = set()  # temporary files that may be there
        # What workers hang on, and the task by which others do it.
        self._late: dict[_Given, _Task] = {}
        self._patience = Patience()
        pulse.also = crew.beat
        crew.on_loss = self._give_up

    def run(self) -> Generator[FinishedStretch]:
        """Yield what is finished until all of it is, or until it has to end."""
        while True:
            interruption = self._job.interruption
            if interruption.insisted:  # within Ray, where exceptions are lost
                raise interruption.error("interrupted")
            if self._ending is None and interruption.requested is not None:
                self._end(StoppedError())
            if self._ending is None:
                self._tend()
                self._share()
                self._assign()
            self._look_for_hung()
            while self._finished:
                stretch, lengths = self._finished.popleft()
                yield stretch
                self._unnamed.discard(stretch.file.temporary)
                self._pulse.computed(lengths)
            if self._is_over():
                break
            self._crew.mail.handle_next(_BETWEEN_LOOKS)
            self._pulse.beat_if_due()
        if self._ending is not None:
            raise self._ending

    def close(self) -> set[Path]:
        """End the workers if any of them still computes; remove files that nobody waits for.

        Returns the files, which a worker that was ended may yet write.
        """
        if self._late or any(one.given for one in self._crew.admitted):
            self._crew.dismiss()
        _remove(self._unnamed)
        return self._unnamed

    def _is_computing(self) -> bool:
        return any(not one.unneeded for member in self._crew.admitted for one in member.given)

    def _is_over(self) -> bool:
        if self._is_computing() or self._taking or self._finished:
            return False
        return self._ending is not None or (self._exhausted and not self._again)

    def _end(self, error: Exception) -> None:
        """Give out nothing more; what is begun is finished, then `error` is raised."""
        if self._ending is None:
            self._ending = error
            self._again.clear()
            self._crew.stop()

    # ---- Giving

    def _tend(self) -> None:
        try:
            self._crew.tend()
        except LedgerError as error:
            self._end(error)

    def _share(self) -> None:
        """Find out of new workers whether they see the run's folder."""
        for member in self._crew.admitted:
            if member.sent is not None or member.folder_asked:
                continue
            member.folder_asked = True
            files = self._job.settings.cluster.files
            if files == "sent":
                member.sent = True
                continue
            nonce, copy = (self._temporary(0, secrets.token_hex(8)) for _ in range(2))
            said = secrets.token_hex(16)
            with disk_errors(nonce):
                nonce.write_text(said)
            with ray_errors():
                copied = member.actor.copy_nonce.remote(nonce, copy)
            self._crew.mail.expect(copied, partial(self._shared, member, nonce, copy, said))

    def _shared(
        self, member: Member, nonce: Path, copy: Path, said: str, done: Future[str | None]
    ) -> None:
        try:
            answer = None if member.gone else done.result()
        except Exception as error:  # Ray's own
            self._crew.lose(member, one_line(error))
        try:
            if member.gone:
                return
            sees = answer is None and copy.is_file() and copy.read_text() == said
            if not sees and self._job.settings.cluster.files == "shared":
                fact = answer or f"{copy}: not what the driver wrote"
                self._crew.refuse(member, MachineError(f"the run's folder is not shared: {fact}"))
                return
            member.sent = not sees
            if not sees:
                self._crew.say(f"{member}: does not see {nonce.parent}, its files are sent")
        finally:
            _remove((nonce, copy))
            self._unnamed -= {nonce, copy}

    def _assign(self) -> None:
        """Give every worker its next stretch: first to those that have none."""
        for already in range(_GIVEN):
            for member in self._crew.admitted:
                if member.sent is not None and len(member.given) == already:
                    task = self._next_task(member)
                    if task is not None:
                        self._give(member, task)

    def _next_task(self, member: Member) -> _Task | None:
        """Return what a worker does next; what has failed on it is left to another, if any is."""
        for task in self._again:
            if member not in task.failed_on or {*self._crew.admitted} <= {*task.failed_on}:
                self._again.remove(task)
                return task
        if self._exhausted or self._ending is not None:
            return None
        try:
            stretch = self._division.next(member.rate, len(self._crew.admitted))
        except (InputError, MachineError) as error:
            self._end(error)
            return None
        if stretch is None:
            self._exhausted = True
            return None
        return self._task(stretch)

    def _task(self, stretch: Stretch, failed_on: Sequence[Member] = ()) -> _Task:
        with ray_errors():
            return _Task(stretch, import_ray().put(list(stretch.packs)), [*failed_on])

    def _give(self, member: Member, task: _Task) -> None:
        token = secrets.token_hex(8)
        path = self._temporary(task.stretch.positions.start, token)
        # The stretch is what was cut: no rule of time or number ends it.
        rules = replace(self._rules, token=token, seconds=float("inf"), records=sys.maxsize)
        order = Order(rules, self._columns, self._per_tok_dtype, sent=bool(member.sent))
        compute = member.actor.compute.options(num_returns=2)
        with ray_errors():
            answer, content = compute.remote(order, task.packs)
        given = _Given(task, member, path, content)
        if not member.given:
            member.since = self._patience.now()
        member.given.append(given)
        self._crew.mail.expect(answer, partial(self._answered, given))

    def _temporary(self, position: int, token: str) -> Path:
        """Return a new name in the run's folder, whose file is removed in the end."""
        name = temporary_name(self._rules.attempt_id, position, token)
        path = self._rules.folder / name
        self._unnamed.add(path)
        return path

    # ---- Taking back

    def _give_up(self, member: Member, fact: str) -> None:
        """Give what a lost worker had to others; what it still writes has no taker."""
        for given in member.given:
            if not given.unneeded:
                self._do_again(given.task, member, fact)
        member.given.clear()

    def _look_for_hung(self) -> None:
        """Give what workers hang on to others; without any, end them, for others in their place."""
        stalled = self._patience.stalled()
        for member in self._crew.admitted:
            member.since += stalled
            taken = self._patience.now() - member.since
            if member.given and taken > self._patience.most_seconds(
                member.given[0].task.stretch.cost
            ):
                self._hang(member, taken)
        if not self._crew.admitted:
            for given in list(self._late):
                self._drop(given)

    def _hang(self, member: Member, seconds: float) -> None:
        """Give what a worker has to others, and take the first of what it hangs on if it comes."""
        first, *waiting = member.given
        member.given.clear()
        fact = f"no answer in {seconds:.0f} s"
        self._crew.suspend(member, fact)
        if self._ending is None:
            self._again += [given.task for given in waiting if not given.unneeded]
        if first.unneeded:
            self._crew.release(member)
            return
        self._late[first] = first.task
        if self._ending is None:
            self._do_again(first.task, member, fact)

    def _drop(self, given: _Given) -> None:
        """Wait no more for a worker that hangs."""
        del self._late[given]
        self._crew.release(given.member)

    def _do_again(self, task: _Task, member: Member, fact: str) -> None:
        """Have a stretch that failed on a worker computed again; end the work if it never helps."""
        task.failed_on.append(member)
        if len(task.failed_on) < _TRIES:
            self._again.append(task)
        else:
            positions = task.stretch.positions
            place = f"positions {positions.start} to {positions.stop}"
            self._end(MachineError(f"{place} failed {_TRIES} times: {member}: {fact}"))

    def _answered(self, given: _Given, done: Future[Answer]) -> None:
        member, stretch = given.member, given.task.stretch
        is_late = given in self._late
        if not is_late and given not in member.given:  # it was given up before
            return
        try:
            answer = done.result()
        except Exception as error:  # Ray's own, or what leaves a process of no use: a broken GPU
            if not is_late:
                self._crew.lose(member, one_line(error))
                return
            answer = Answer(0, failure=Failure("MachineError", one_line(error)))
        if is_late:
            self._answered_late(given, answer)
            return
        begun = stretch.first(answer.packs) if answer.packs else None
        self._count(given, begun)
        if given.unneeded:
            return
        for late in [one for one, task in self._late.items() if task is given.task]:
            self._drop(late)
        self._go_on_after(given, answer)
        if begun is None:
            return
        member.rate = begun.cost / max(answer.seconds, 1e-3)
        self._to_take.append((given, answer))
        self._take()

    def _answered_late(self, given: _Given, answer: Answer) -> None:
        """Take the whole stretch of a worker that hung, if no other has answered before it."""
        if answer.packs < len(given.task.stretch.packs):
            self._drop(given)
            return
        task = self._late.pop(given)
        self._again = deque(one for one in self._again if one is not task)
        for member in self._crew.admitted:
            for other in member.given:
                other.unneeded |= other.task is task
        self._to_take.append((given, answer))
        self._take()

    def _count(self, given: _Given, begun: Stretch | None) -> None:
        """Take what was answered from its worker, and learn how long work takes."""
        member, now = given.member, self._patience.now()
        if begun is not None and given is member.given[0]:
            self._patience.learn(now - member.since, begun.cost)
        member.given.remove(given)
        member.since = now
        member.seen_at = utc_now()

    def _go_on_after(self, given: _Given, answer: Answer) -> None:
        """Have the packs of a stretch computed that the worker has not."""
        member, stretch, failure = given.member, given.task.stretch, answer.failure
        if failure is not None and failure.kind == "NonFiniteError":
            self._end(failure.error())
        member.failed = 0 if answer.packs else member.failed + 1
        if answer.packs == len(stretch.packs) or self._ending is not None:
            return
        fact = failure.message if failure else "ended early"
        self._crew.say(f"{member}: {fact}")
        left = self._task(stretch.without(answer.packs), given.task.failed_on)
        self._do_again(left, member, fact)
        if member.failed == _TRIES:
            self._crew.lose(member, f"failed {_TRIES} times in a row: {fact}")

    def _take(self) -> None:
        """Take the files that came back: a few at a time, which bounds memory."""
        while self._to_take and self._taking < _TAKEN_AT_ONCE:
            given, answer = self._to_take.popleft()
            self._taking += 1
            if given.member.sent:
                self._crew.mail.expect(given.content, partial(self._fetched, given, answer))
            else:
                self._read(given, answer, _received)

    def _fetched(self, given: _Given, answer: Answer, done: Future[Any]) -> None:
        try:
            content = done.result()
        except Exception as error:  # Ray's own: it is lost with its machine
            self._taking -= 1
            self._take_again(given, answer, one_line(error))
            self._take()
        else:
            self._read(given, answer, partial(_written, content))

    def _read(
        self, given: _Given, answer: Answer, read: Callable[[Path, Answer], FinishedFile]
    ) -> None:
        """Have a file verified by another thread."""
        reading = beside(partial(read, given.path.with_name(answer.name), answer))
        self._crew.mail.expect(reading, partial(self._verified, given, answer))

    def _verified(self, given: _Given, answer: Answer, done: Future[FinishedFile]) -> None:
        """List a file as finished if it is the one that the worker wrote."""
        self._taking -= 1
        self._take()
        stretch = given.task.stretch.first(answer.packs)
        try:
            file = done.result()
        except _DamagedError as error:
            self._take_again(given, answer, f"{error}, computed again")
            return
        except MachineError as error:
            self._end(error)
            return
        if file.records != stretch.records:
            fact = f"{answer.name}: {file.records} records of {stretch.records}, computed again"
            self._take_again(given, answer, fact)
            return
        lengths, row = stretch.lengths, given.member.row
        found = FinishedStretch(
            file, stretch.positions, sum(lengths), answer.seconds, worker_id=row
        )
        self._finished.append((found, lengths))

    def _take_again(self, given: _Given, answer: Answer, fact: str) -> None:
        """Have what a worker computed computed again, as its file is lost or damaged."""
        self._crew.say(f"{given.member}: {fact}")
        begun = self._task(given.task.stretch.first(answer.packs), given.task.failed_on)
        self._do_again(begun, given.member, fact)


class _DamagedError(Exception):
    """A file is not the one that a worker wrote."""


def _received(path: Path, answer: Answer) -> FinishedFile:
    """Return a file that a worker wrote into the run's folder; raises _DamagedError."""
    try:
        with path.open("rb") as file:
            return _digested(path, file, answer)
    except OSError as error:
        raise _DamagedError(f"{path.name}: {error.strerror or error}") from None


def _written(content: npt.NDArray[np.uint8], path: Path, answer: Answer) -> FinishedFile:
    """Write a file that a worker sent; raises _DamagedError, and MachineError if the disk fails."""
    with disk_errors(path), path.open("x+b") as file:
        file.write(content.data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return _digested(path, file, answer)


def _digested(
    path: Path, file: io.BufferedReader | io.BufferedRandom, answer: Answer
) -> FinishedFile:
    """Return an open file with its digest, taken through its descriptor."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = os.fstat(file.fileno())
    if (found.st_size, digest) != (answer.bytes, answer.sha256):
        raise _DamagedError(
            f"{path.name}: {found.st_size} bytes with sha256 {digest}, {answer.bytes} with "
            f"{answer.sha256} were written"
        )
    return FinishedFile(path, (found.st_dev, found.st_ino), answer.records, answer.bytes, digest)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _cost_of(lengths: Sequence[int], hidden_dim: int) -> float:
    return computing_cost(np.asarray(lengths), hidden_dim)
