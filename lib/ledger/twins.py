"""Twins: finished runs that have the very vectors that a new run is asked for."""

from __future__ import annotations

import stat
from pathlib import Path

from sqlalchemy import Engine, select

from lib.errors import IdentityRefusedError
from lib.ledger.database import transaction
from lib.ledger.runs import load_run
from lib.ledger.sources import Wanted
from lib.sequences.inventory import Inventory
from schema.tables import Checkpoint, Model, Run

__all__ = ["describe_twin", "finished_twin"]


def finished_twin(engine: Engine, wanted: Wanted, inventory: Inventory) -> int | None:
    """Return the newest finished run of the same weights, rules and input; None if there is none.

    It has all that is wanted, or more, in files that are there with their sizes; none is opened.
    Rows that cannot be read are passed over. Raises MachineError if the database fails.
    """
    for run_id in _candidates(engine, wanted, inventory):
        try:
            run = load_run(engine, run_id)
            if wanted.is_kept_by(run) and all(_is_there(run, one) for one in run.checkpoints):
                return run_id
        except (IdentityRefusedError, TypeError, ValueError):
            continue
    return None


def _is_there(run: Run, checkpoint: Checkpoint) -> bool:
    try:
        found = (Path(run.output_folder) / checkpoint.path).lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == checkpoint.bytes


def describe_twin(run_id: int) -> str:
    """Return the line about a run that has the vectors already."""
    return f"run {run_id} has these vectors"


def _candidates(engine: Engine, wanted: Wanted, inventory: Inventory) -> list[int]:
    """Return the finished runs whose weights, input and rules are the same, newest first."""
    rules = wanted.settings.input
    query = (
        select(Run.id)
        .join(Model, Run.model_id == Model.id)
        .where(
            Run.status == "finished",
            Run.pruned_at.is_(None),
            Run.input_sha256 == inventory.sha256,
            *wanted.conditions,
            Run.max_residues == rules.max_residues,
            Run.unknown_residues == rules.unknown_residues,
        )
        .order_by(Run.id.desc())
    )
    with transaction(engine) as session:
        return list(session.scalars(query))
