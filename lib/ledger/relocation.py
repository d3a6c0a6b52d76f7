"""Relocation: where the folder of a run lies now is written down, after a look at its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from lib.errors import IdentityRefusedError
from lib.ledger.audit import difference
from lib.ledger.database import transaction
from lib.ledger.history import refuse_pruned
from lib.ledger.ownership import is_held
from lib.ledger.places import stored_path
from lib.ledger.reuse_plan import check_plan
from lib.ledger.runs import load_run, owned_by_another
from schema.tables import Input, Run

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
        _write_down(session, run_id, stored_path(folder, Path(engine.url.database or "")))
    return Relocation(run_id, before, folder, len(run.checkpoints))


def _faults(run: Run, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a run; no page is read."""
    for checkpoint in run.checkpoints:
        fault = difference(run, checkpoint, folder / checkpoint.path)
        if fault is not None:
            yield f"{checkpoint.path}: {fault}"
    for file in run.inputs:
        path = Path(file.path)
        if path.parent == folder and (not path.is_file() or path.stat().st_size != file.bytes):
            yield f"{path.name}: not the input that was kept"


def _write_down(session: Session, run_id: int, place: str) -> None:
    """Record the folder of a run, and with it the copy of standard input that is kept there."""
    run = session.get_one(Run, run_id)
    before = run.output_folder
    within = f"{before}/"
    for file in session.scalars(
        select(Input).where(Input.path.startswith(within, autoescape=True))
    ):
        file.path = f"{place}/{PurePath(file.path).name}"
    for one in session.scalars(
        select(Run).where(Run.input_path.startswith(within, autoescape=True))
    ):
        one.input_path = f"{place}/{PurePath(one.input_path).name}"
    run.output_folder = place
