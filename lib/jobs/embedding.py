"""Embedding: what is left of a run is copied or computed, stretch by stretch, and committed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from sqlalchemy import Engine

from lib.columns import Vectors
from lib.jobs.copying import Copying, copied_stretches
from lib.jobs.interruption import Interruption
from lib.jobs.reuse import SourceFiles
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.ledger.checkpoints import FinishedStretch
from lib.ledger.commit import Committer
from lib.ledger.footer import TOTALS
from lib.ledger.identity import run_columns, run_identity
from lib.ledger.reuse_plan import ReusePlan
from lib.ledger.runs import Ownership, beat, finish_run
from lib.network.device import packs_at_once
from lib.network.esm2 import Network
from lib.network.memory import available_bytes, device_errors, give_back
from lib.network.pipeline import StoppedError, computed
from lib.sequences.inventory import Inventory
from lib.sequences.plan import Pack, packs_left, remaining
from lib.sequences.rearranged import rearranged_windows
from lib.sequences.reused import bounded_windows, planned_lengths, planned_windows
from lib.sequences.windows import Window
from lib.settings import Settings
from schema.parquet import vector_columns
from schema.tables import Checkpoint, Run
from schema.version import WRITER

__all__ = [
    "Computer",
    "Job",
    "Pulse",
    "ThisProcess",
    "committed",
    "computes",
    "lengths_left",
    "to_compute",
    "work",
]

_HEARTBEAT_SECONDS = 10.0
# Copying takes up to 80 MB; the rest is for the code that it runs.
_COPYING_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class Job:
    """All that the work on a run needs.

    `progress` is told the lengths of what was computed. reuse: what the run copies; `copied` is
    told how many sequences were copied, `lost` the lengths of those that have to be computed
    instead, `say` why.
    """

    engine: Engine
    ownership: Ownership
    settings: Settings
    inventory: Inventory
    computer: Computer
    interruption: Interruption
    progress: Callable[[Sequence[int]], None]
    reuse: ReusePlan | None = None
    copied: Callable[[int], None] = lambda _: None
    lost: Callable[[npt.NDArray[np.int32]], None] = lambda _: None
    say: Callable[[str], None] = lambda _: None


class Computer(Protocol):
    """What computes the packs of a run: this process, or the workers of a cluster."""

    @property
    def at_once(self) -> int:
        """How many packs a device computes at once, which the plan takes into account."""

    @property
    def reports_at_once(self) -> int:
        """How many packs, or stretches of workers, are told to progress at about the same time."""

    def make_ready(self) -> None:
        """Load the model, here or by a worker, unless that is done; `stretches` does it at need.

        Raises WeightsError if the weights have changed since their digest was taken, MachineError
        if memory, disk or cluster fail.
        """

    def make_room(self) -> None:
        """Free what can be loaded again, where memory is short for rows that are copied first."""

    def stretches(
        self, job: Job, packs: Iterator[Pack], rules: StretchRules, pulse: Pulse
    ) -> Generator[FinishedStretch]:
        """Yield `packs` as stretches in finished files; `pulse` is told what is computed.

        Raises StoppedError once an interruption is requested and what was begun has been yielded,
        and what reading `packs` and computing them raise, after yielding what is still good.
        """


class ThisProcess:
    """Computes in this process, with a network that is in its memory once it is needed."""

    def __init__(self, device: torch.device, load: Callable[[], Network]) -> None:
        """Compute on a device; load: gives the network, and gives it again after `make_room`."""
        self._device = device
        self._network = cache(load)

    @property
    def at_once(self) -> int:
        """How many packs the device computes at once."""
        return packs_at_once(self._device)

    @property
    def reports_at_once(self) -> int:
        """How many packs end at about the same time."""
        return self.at_once

    def make_ready(self) -> None:
        """Load the network."""
        self._network()

    def make_room(self) -> None:
        """Forget the network if memory is short: that it can be loaded has been seen."""
        left = available_bytes(torch.device("cpu"), _COPYING_BYTES)
        if left is not None and left < _COPYING_BYTES:
            self._network.cache_clear()

    def stretches(
        self, job: Job, packs: Iterator[Pack], rules: StretchRules, pulse: Pulse
    ) -> Generator[FinishedStretch]:
        """Yield stretches in the order of the plan."""
        with (
            closing(self._computed(job, packs)) as on_way,
            closing(finished_stretches(on_way, rules, pulse.pack_done)) as stretches,
        ):
            yield from stretches

    def _computed(self, job: Job, packs: Iterator[Pack]) -> Generator[tuple[Pack, Vectors]]:
        run = job.ownership.run
        # A worker of a cluster does not do so: its process is of no use then, and is replaced.
        with device_errors(self._device):
            yield from computed(
                self._network(),
                packs,
                vector_columns(run.include, run.repr_layers),
                run.per_tok_dtype,
                stopped=lambda: job.interruption.requested is not None,
            )


def work(job: Job) -> Run:
    """Copy and compute what is left of a run, commit it in stretches, and record it as finished.

    Signals should be deferred: they are looked at before a pack is begun. Returns the run. Raises
    what stopped it, after committing what was finished: InterruptedRunError for a signal,
    NonFiniteError naming the record, InputError for a file that has changed, MachineError for
    disk, database or memory.
    """
    run = job.ownership.run
    committer, pulse = Committer(job.engine, job.ownership), Pulse(job)
    try:
        if job.reuse is not None:
            job.computer.make_room()
            with closing(copied_stretches(_copying(job, job.reuse, pulse))) as stretches:
                for stretch in stretches:
                    committer.commit(stretch)
                    give_back()  # what is computed next needs the room
        packs = _packs_left(job)
        first = next(packs, None)
        if first is not None:  # or no model is needed
            packs = itertools.chain([first], packs)
            computed = job.computer.stretches(job, packs, _rules(job), pulse)
            with closing(computed) as stretches:
                for stretch in stretches:
                    committer.commit(stretch)
    except StoppedError:
        fact = f"run {run.id} interrupted, finished work committed"
        raise job.interruption.error(fact, run.id) from None
    finish_run(job.engine, job.ownership)
    return run


def committed(run: Run, without: Sequence[Checkpoint] = ()) -> list[range]:
    """Return the positions that checkpoints of a run cover, but for some of them, ascending."""
    kept = [one for one in run.checkpoints if one not in without]
    done = [range(one.first_position, one.stop_position) for one in kept]
    return sorted(done, key=lambda one: one.start)


def computes(run: Run, reuse: ReusePlan | None, damaged: Sequence[Checkpoint]) -> bool:
    """Return whether anything is left of a run that no earlier run is to be copied for.

    damaged: checkpoints whose positions are left, too.
    """
    copied = 0 if reuse is None else len(reuse)
    left = remaining(range(run.sequences_total), committed(run, damaged))
    return any(one.stop > copied for one in left)


def to_compute(
    run: Run, inventory: Inventory, reuse: ReusePlan | None
) -> tuple[npt.NDArray[np.int32], list[range]]:
    """Return the lengths of what a run computes, and which of them it has computed already.

    Sequences that were to be copied are there only if they were computed instead; they come first.
    """
    if reuse is None:
        return inventory.lengths, committed(run)
    lengths, copied = planned_lengths(inventory, reuse.reused), len(reuse)
    computed = [
        range(one.first_position, one.stop_position)
        for one in sorted(run.checkpoints, key=lambda one: one.first_position)
        if one.reused_run_id is None
    ]
    instead = [one for one in computed if one.stop <= copied]
    before = sum(map(len, instead))
    done = [range(before)] + [
        range(one.start - copied + before, one.stop - copied + before)
        for one in computed
        if one.start >= copied
    ]
    parts = [lengths[one.start : one.stop] for one in instead]
    return np.concatenate([*parts, lengths[copied:]]), done


def _copying(job: Job, reuse: ReusePlan, pulse: Pulse) -> Copying:
    """Return what is to be copied of a run."""

    def copied(sequences: int) -> None:
        job.copied(sequences)
        pulse.beat_if_due()

    return Copying(
        reuse,
        job.settings.input,
        job.inventory,
        _rules(job),
        committed(job.ownership.run),
        SourceFiles(job.engine).verified,
        stopped=lambda: job.interruption.requested is not None,
        copied=copied,
        say=job.say,
    )


def lengths_left(job: Job) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the residues of the sequences that no checkpoint covers, in parts."""
    reused = None if job.reuse is None else job.reuse.reused
    lengths = planned_lengths(job.inventory, reused)
    for left in remaining(range(len(lengths)), committed(job.ownership.run)):
        yield lengths[left.start : left.stop]


def _packs_left(job: Job) -> Iterator[Pack]:
    """Return the packs that no checkpoint covers."""
    reused = None if job.reuse is None else job.reuse.reused
    return packs_left(
        itertools.chain(_lost(job), planned_windows(job.settings.input, job.inventory, reused)),
        job.settings.compute.tokens_per_pack,
        job.computer.at_once,
        committed(job.ownership.run),
    )


def _lost(job: Job) -> Iterator[Window]:
    """Yield, as windows to compute, the sources that could not be copied to their end."""
    if job.reuse is None:
        return
    reused, done = job.reuse.reused, committed(job.ownership.run)
    lengths = job.inventory.record_lengths[reused.records]
    windows = [
        window
        for source in job.reuse.sources
        for window in bounded_windows(source.positions, lengths)
        if any(remaining(window, done))
    ]
    for left in remaining(range(len(reused)), done):
        job.lost(lengths[left.start : left.stop])
    folder = Path(job.ownership.run.output_folder)
    yield from rearranged_windows(job.settings.input, job.inventory, reused, windows, folder)


def _rules(job: Job) -> StretchRules:
    run, output = job.ownership.run, job.settings.output
    return StretchRules(
        folder=Path(run.output_folder),
        attempt_id=job.ownership.attempt_id,
        columns=run_columns(run),
        footer={
            "writer": WRITER,
            "run": run.id,
            "identity": run_identity(run),
            "settings": run.settings,
            "totals": {name: getattr(run, name) for name in TOTALS},
            "inputs": [
                {
                    "path": file.path,
                    "sha256": file.sha256,
                    "bytes": file.bytes,
                    "first_record": file.first_record,
                    "records": file.records,
                }
                for file in run.inputs
            ],
        },
        seconds=output.checkpoint_seconds,
        records=output.checkpoint_records,
    )


class Pulse:
    """Tells progress of what is computed, and the database that the attempt is alive.

    also: what is done at each sign of life.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.also: Callable[[], None] = lambda: None
        self._last_beat = time.monotonic()

    def pack_done(self, pack: Pack) -> None:
        """Count a pack."""
        self.computed([len(sequence.residues) for sequence in pack.sequences])

    def computed(self, lengths: Sequence[int]) -> None:
        """Count sequences; lengths: (N,) residues of each."""
        self._job.progress(lengths)
        self.beat_if_due()

    def beat_if_due(self) -> None:
        """Say that the attempt is alive, if it has not lately."""
        if time.monotonic() - self._last_beat > _HEARTBEAT_SECONDS:
            beat(self._job.engine, self._job.ownership)
            self.also()
            self._last_beat = time.monotonic()
