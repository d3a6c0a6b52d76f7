"""Embedding: what is left of a run is computed, stretch by stretch, and committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine

from lib.columns import Vectors
from lib.jobs.interruption import Interruption
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.ledger.commit import Committer, FinishedStretch
from lib.ledger.identity import run_config, run_identity
from lib.ledger.runs import Ownership, beat, finish_run
from lib.network.device import packs_at_once
from lib.network.esm2 import Network
from lib.network.pipeline import StoppedError, computed
from lib.sequences.inventory import Inventory
from lib.sequences.plan import Pack, packs_left, remaining
from lib.sequences.windows import read_windows
from lib.settings import Settings
from schema.parquet import checkpoint_columns, vector_columns
from schema.tables import Run
from schema.version import WRITER

__all__ = ["Computer", "Job", "Pulse", "ThisProcess", "lengths_left", "work"]

_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """All that the work on a run needs; `progress` is told the lengths of what was computed."""

    engine: Engine
    ownership: Ownership
    settings: Settings
    inventory: Inventory
    computer: Computer
    interruption: Interruption
    progress: Callable[[Sequence[int]], None]


class Computer(Protocol):
    """What computes the packs of a run: this process, or the workers of a cluster."""

    @property
    def at_once(self) -> int:
        """How many packs a device computes at once, which the plan takes into account."""

    @property
    def reports_at_once(self) -> int:
        """How many packs, or stretches of workers, are told to progress at about the same time."""

    def stretches(
        self, job: Job, packs: Iterator[Pack], rules: StretchRules, pulse: Pulse
    ) -> Generator[FinishedStretch]:
        """Yield `packs` as stretches in finished files; `pulse` is told what is computed.

        Raises StoppedError once an interruption is requested and what was begun has been yielded,
        and what reading `packs` and computing them raise, after yielding what is still good.
        """


class ThisProcess:
    """Computes in this process, with a network in its memory."""

    def __init__(self, network: Network) -> None:
        self._network = network

    @property
    def at_once(self) -> int:
        """How many packs the device computes at once."""
        return packs_at_once(self._network.device)

    @property
    def reports_at_once(self) -> int:
        """How many packs end at about the same time."""
        return self.at_once

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
        yield from computed(
            self._network,
            packs,
            vector_columns(run.include, run.repr_layers),
            run.per_tok_dtype,
            stopped=lambda: job.interruption.requested is not None,
        )


def work(job: Job) -> Run:
    """Compute what is left of a run, commit it in stretches, and record the run as finished.

    Signals should be deferred: they are looked at before a pack is begun. Returns the run. Raises
    what stopped it, after committing what was finished: InterruptedRunError for a signal,
    NonFiniteError naming the record, InputError for a file that has changed, MachineError for
    disk, database or memory.
    """
    run = job.ownership.run
    committer = Committer(job.engine, job.ownership)
    with closing(
        job.computer.stretches(job, _packs_left(job), _rules(job), Pulse(job))
    ) as stretches:
        try:
            for stretch in stretches:
                committer.commit(stretch)
        except StoppedError:
            fact = f"run {run.id} interrupted, finished work committed"
            raise job.interruption.error(fact) from None
    finish_run(job.engine, job.ownership)
    return run


def lengths_left(job: Job) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the residues of the sequences that no checkpoint covers, in parts."""
    lengths, done = job.inventory.lengths, _done(job)
    for left in remaining(range(len(lengths)), done):
        yield lengths[left.start : left.stop]


def _done(job: Job) -> list[range]:
    """Return the positions that checkpoints cover, ascending."""
    run = job.ownership.run
    done = [range(one.first_position, one.stop_position) for one in run.checkpoints]
    return sorted(done, key=lambda one: one.start)


def _packs_left(job: Job) -> Iterator[Pack]:
    """Return the packs that no checkpoint covers."""
    return packs_left(
        read_windows(job.settings.input, job.inventory),
        job.settings.compute.tokens_per_pack,
        job.computer.at_once,
        _done(job),
    )


def _rules(job: Job) -> StretchRules:
    run, output = job.ownership.run, job.settings.output
    width = run_config(run).hidden_dim
    return StretchRules(
        folder=Path(run.output_folder),
        attempt_id=job.ownership.attempt_id,
        columns=checkpoint_columns(run.include, run.repr_layers, width, run.per_tok_dtype),
        footer={
            "writer": WRITER,
            "run": run.id,
            "identity": run_identity(run),
            "settings": run.settings,
            "inputs": [
                {
                    "path": file.path,
                    "sha256": file.sha256,
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
    """Tells progress of what is computed, and the database now and then that the attempt lives."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_beat = time.monotonic()

    def pack_done(self, pack: Pack) -> None:
        """Count a pack."""
        self.computed([len(sequence.residues) for sequence in pack.sequences])

    def computed(self, lengths: Sequence[int]) -> None:
        """Count sequences; lengths: (N,) residues of each."""
        self._job.progress(lengths)
        self.beat()

    def beat(self) -> None:
        """Say that the attempt is alive, unless it did so a moment ago."""
        if time.monotonic() - self._last_beat > _HEARTBEAT_SECONDS:
            beat(self._job.engine, self._job.ownership)
            self._last_beat = time.monotonic()
