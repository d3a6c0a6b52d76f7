"""Whereabouts: where the folder and the input of a run lie now, written into its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from sqlalchemy import select
from sqlalchemy.orm import Session

from lib.ledger.places import stored_path
from schema.tables import Input, Run

__all__ = ["write_folder", "write_input"]


def write_folder(session: Session, run_id: int, folder: Path, database: Path) -> None:
    """Record the folder of a run, and with it the copy of standard input that is kept there."""
    run, place = session.get_one(Run, run_id), stored_path(folder, database)
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


def write_input(session: Session, run_id: int, paths: Sequence[Path], database: Path) -> None:
    """Record where the files of a run's input lie, in their order."""
    run = session.get_one(Run, run_id)
    for file, path in zip(run.inputs, paths, strict=True):
        file.path = stored_path(path, database)
    run.input_path = run.inputs[0].path
