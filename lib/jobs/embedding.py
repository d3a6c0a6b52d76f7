"""Embedding: what is left of a run is computed, stretch by stretch, and committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from lib.columns import Vectors
from lib.jobs.interruption import Interruption
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.ledger.commit import Committer
from lib.ledger.identity import run_config, run_identity
from lib.ledger.runs import Ownership, beat, finish_run
from lib.network.device import packs_at_once
from lib.network.esm2 import Network
from lib.network.pipeline import StoppedError, computed
from lib.sequences.inventory import Inventory
from lib.sequences.plan import Pack, packs_left
from lib.sequences.windows import read_windows
from lib.settings import Settings
from schema.parquet import checkpoint_columns, vector_columns
from schema.tables import Run
from schema.version import WRITER

__all__ = ["Job", "work"]

_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """All that the work on a run needs; `progress` is told the lengths of every pack computed."""

    engine: Engine
    ownership: Ownership
    settings: Settings
    inventory: Inventory
    network: Network
    interruption: Interruption
    progress: Callable[[Sequence[int]], None]


def work(job: Job) -> Run:
    """Compute what is left of a run, commit it in stretches, and record the run as finished.

    Signals should be deferred: they are looked at before a pack is begun. Returns the run. Raises
    what stopped it, after committing what was finished: InterruptedRunError for a signal,
    NonFiniteError naming the record, InputError for a file that has changed, MachineError for
    disk, database or memory.
    """
    run = job.ownership.run
    committer = Committer(job.engine, job.ownership)
    with (
        closing(_computed(job)) as packs,
        closing(finished_stretches(packs, _rules(job), _Pulse(job).pack_done)) as stretches,
    ):
        try:
            for stretch in stretches:
                committer.commit(stretch)
        except StoppedError:
            fact = f"run {run.id} interrupted, finished work committed"
            raise job.interruption.error(fact, run.id) from None
    finish_run(job.engine, job.ownership)
    return run


def _computed(job: Job) -> Generator[tuple[Pack, Vectors]]:
    """Return the packs that no checkpoint covers, on their way through the network."""
    run = job.ownership.run
    packs = packs_left(
        read_windows(job.settings.input, job.inventory),
        job.settings.compute.tokens_per_pack,
        packs_at_once(job.network.device),
        [range(one.first_position, one.stop_position) for one in run.checkpoints],
    )
    yield from computed(
        job.network,
        packs,
        vector_columns(run.include, run.repr_layers),
        run.per_tok_dtype,
        stopped=lambda: job.interruption.requested is not None,
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


class _Pulse:
    """Tells progress of every pack, and the database now and then that the attempt is alive."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_beat = time.monotonic()

    def pack_done(self, pack: Pack) -> None:
        """Count a pack."""
        self._job.progress([len(sequence.residues) for sequence in pack.sequences])
        if time.monotonic() - self._last_beat > _HEARTBEAT_SECONDS:
            beat(self._job.engine, self._job.ownership)
            self._last_beat = time.monotonic()
