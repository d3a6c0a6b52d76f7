"""Embedding: the loop that joins windows, packs, network, pooling, checkpoints and runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from lib.columns import Vectors
from lib.errors import InputError, MachineError
from lib.jobs.interruption import Interruption
from lib.ledger.checkpoints import CheckpointWriter, rename_into_place
from lib.ledger.identity import run_config, run_identity
from lib.ledger.runs import (
    Ownership,
    add_checkpoint,
    beat,
    end_attempt,
    load_run,
    next_checkpoint_number,
)
from lib.network.device import packs_at_once
from lib.network.esm2 import Network
from lib.network.pipeline import StoppedError, computed
from lib.network.vectors import NonFiniteError
from lib.sequences.inventory import Inventory
from lib.sequences.plan import Pack, plan_packs, remaining
from lib.sequences.windows import Window, read_windows
from lib.settings import Settings
from schema.parquet import checkpoint_columns, vector_columns
from schema.tables import Run
from schema.version import WRITER

__all__ = ["Job", "work"]

_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """All that the work on a run needs."""

    engine: Engine
    ownership: Ownership
    settings: Settings
    inventory: Inventory
    network: Network
    interruption: Interruption
    progress: Callable[[Sequence[int]], None]


def work(job: Job) -> Run:
    """Compute what is left of a run, committing checkpoints, and record it as finished.

    `job.progress` is told the lengths of every pack; signals should be deferred, they are
    looked at before a pack is begun. Returns the finished run. Raises what stopped it, after
    committing what was finished: InterruptedRunError for a signal, NonFiniteError naming the
    record, InputError for a file that has changed, MachineError for disk, database or memory.
    """
    run = load_run(job.engine, job.ownership.run_id)
    stretch = _Stretch(job, run)
    try:
        _work_through(job, run, stretch)
        stretch.commit()
        end_attempt(job.engine, job.ownership, "finished", None)
    except BaseException:
        stretch.discard()
        raise
    return load_run(job.engine, run.id)


def _work_through(job: Job, run: Run, stretch: _Stretch) -> None:
    with closing(_computed(job, run, stretch)) as packs:
        for pack, vectors in packs:
            stretch.add(pack, vectors)
            job.progress([len(sequence.residues) for sequence in pack.sequences])
            stretch.commit_if_due()


def _computed(job: Job, run: Run, stretch: _Stretch) -> Generator[tuple[Pack, Vectors], None, None]:
    """Yield what is left of a run with its vectors; what is finished is committed at an error."""
    try:
        yield from computed(
            job.network,
            _left(job, run),
            stretch.vector_columns,
            run.per_tok_dtype,
            stopped=lambda: job.interruption.requested is not None,
        )
    except (InputError, MachineError, NonFiniteError):
        stretch.commit()
        raise
    except StoppedError:
        stretch.commit()
        fact = f"run {run.id} interrupted, finished work committed"
        raise job.interruption.error(fact) from None


def _left(job: Job, run: Run) -> Iterator[Pack]:
    """Yield the packs that no checkpoint covers."""
    done = [range(one.first_position, one.stop_position) for one in run.checkpoints]
    for window in read_windows(job.settings.input, job.inventory):
        first = window.first_position
        for positions in _packs(window, job, done):
            sequences = window.sequences[positions.start - first : positions.stop - first]
            yield Pack(positions, sequences)


def _packs(window: Window, job: Job, done: Sequence[range]) -> Iterable[range]:
    """Yield the packs of a window, as positions in the plan, that no checkpoint covers."""
    stop = window.first_position + len(window.sequences)
    if not any(remaining(range(window.first_position, stop), done)):
        return
    lengths = [len(sequence.residues) for sequence in window.sequences]
    tokens, at_once = job.settings.compute.tokens_per_pack, packs_at_once(job.network.device)
    for pack in plan_packs(lengths, tokens, at_once):
        first = window.first_position
        yield from remaining(range(first + pack.start, first + pack.stop), done)


class _Stretch:
    """Work that is finished but not committed: an open checkpoint file and its positions."""

    def __init__(self, job: Job, run: Run) -> None:
        self._job = job
        self._run = run
        self._config = run_config(run)
        self._columns = checkpoint_columns(
            run.include, run.repr_layers, self._config.hidden_dim, run.per_tok_dtype
        )
        self.vector_columns = vector_columns(run.include, run.repr_layers)
        self._number = next_checkpoint_number(run)
        self._writer: CheckpointWriter | None = None
        self._positions = range(0)
        self._residues = 0
        self._since = self._last_beat = time.monotonic()

    def add(self, pack: Pack, vectors: Vectors) -> None:
        """Take in a pack; a gap before it closes the checkpoint first."""
        positions, sequences = pack.positions, pack.sequences
        if self._writer is not None and positions.start != self._positions.stop:
            self.commit()
        if self._writer is None:
            self._writer = self._open()
            self._positions = range(positions.start, positions.start)
        lengths = [len(sequence.residues) for sequence in sequences]
        self._writer.add(lengths, [sequence.owners for sequence in sequences], vectors)
        self._positions = range(self._positions.start, positions.stop)
        self._residues += sum(lengths)

    def commit_if_due(self) -> None:
        """Commit if [output] asks for a checkpoint by now; else say now and then: still alive."""
        output = self._job.settings.output
        if self._writer is not None and (
            time.monotonic() - self._since >= output.checkpoint_seconds
            or self._writer.records >= output.checkpoint_records
        ):
            self.commit()
        elif time.monotonic() - self._last_beat > _HEARTBEAT_SECONDS:
            beat(self._job.engine, self._job.ownership)
            self._last_beat = time.monotonic()

    def commit(self) -> None:
        """Make what is finished a checkpoint: file synced and renamed, then the row."""
        if self._writer is None:
            return
        finished = self._writer.finish(self._positions.start, self._positions.stop)
        rename_into_place(finished)
        seconds = time.monotonic() - self._since
        add_checkpoint(
            self._job.engine,
            self._job.ownership,
            self._config,
            finished,
            self._positions,
            self._residues,
            seconds,
        )
        self._writer = None
        self._number += 1
        self._residues = 0
        self._since = self._last_beat = time.monotonic()

    def discard(self) -> None:
        """Drop what is not committed."""
        if self._writer is not None:
            with suppress(OSError):  # the disk has been reported already
                self._writer.discard()
            self._writer = None

    def _open(self) -> CheckpointWriter:
        footer = {
            "writer": WRITER,
            "run": self._run.id,
            "identity": run_identity(self._run),
            "settings": self._run.settings,
        }
        folder = Path(self._run.output_folder)
        return CheckpointWriter(folder, self._number, self._columns, footer)
