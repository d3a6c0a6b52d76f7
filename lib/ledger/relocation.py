"""Relocation: where the folder of a run lies now is written down, after a look at its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from lib.errors import IdentityRefusedError
from lib.ledger.audit import differs_from_row
from lib.ledger.database import transaction
from lib.ledger.history import refuse_pruned
from lib.ledger.ownership import is_held
from lib.ledger.reuse_plan import check_plan
from lib.ledger.runs import load_run, owned_by_another
from lib.ledger.whereabouts import write_folder
from schema.tables import Run

__all__ = ["Relocation", "relocate"]


@dataclass(frozen=True)
class Relocation:
    """A run whose folder is on record anew; files: how many checkpoint files lie there."""

    run_id: int
    before: Path
    folder: Path
    files: int


def relocate(engine: Engine, run_id: int, output: Path) -> Relocation:
    """Record that the folder of a run is `output`, or lies within it under its old name.

    Every file that the database lists must be there, with its size and the uuid of the run. Raises
    SettingsError if there is no such run or folder or it is pruned, IdentityRefusedError at the
    first difference, MachineError if a live process owns the run or the database fails.
    """
    before = Path(load_run(engine, run_id).output_folder)
    run = load_run(engine, run_id, output)
    refuse_pruned(run.id, run.pruned_at)
    folder = Path(run.output_folder)
    with transaction(engine) as session:
        if is_held(before) or is_held(folder):
            raise owned_by_another(run)
        faults = [*_faults(run, folder)]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise IdentityRefusedError(f"run {run_id}: {faults[0]}{more}")
        check_plan(run)
        write_folder(session, run_id, folder, Path(engine.url.database or ""))
    return Relocation(run_id, before, folder, len(run.checkpoints))


def _faults(run: Run, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a run; no page is read."""
    for checkpoint in run.checkpoints:
        fault = differs_from_row(run, checkpoint, folder / checkpoint.path)
        if fault is not None:
            yield f"{checkpoint.path}: {fault}"
    for file in run.inputs:
        path = Path(file.path)
        if path.parent == folder and (not path.is_file() or path.stat().st_size != file.bytes):
            yield f"{path.name}: not the input that was kept"
