"""Rebuilding: a lost run database is made anew from the footers of checkpoint files.

A footer has the identity and the settings of its run, its input and what the file holds. It does
not know of attempts: who computed, on which machine, when it ended.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from lib.errors import LedgerError, SettingsError
from lib.files import disk_errors, file_sha256
from lib.ledger.checkpoints import checkpoint_number
from lib.ledger.database import open_for_writing, transaction, utc_now, writing_engine
from lib.ledger.footer import TOTALS
from lib.ledger.ownership import is_held
from lib.ledger.places import real_path, stored_path
from lib.ledger.reuse_plan import plan_name
from lib.ledger.runs import check_types, model_row
from lib.ledger.sqlite_file import database_path
from lib.ledger.standard_input import kept_name
from lib.ledger.unlisted import opened_unlisted
from lib.sequences.inventory import Inventory, preflight
from lib.settings import from_snapshot, override
from lib.units import count, counted
from schema.esm2_config import ESM2Config, load_snapshot
from schema.parquet import EMBEDDED_SHA256, checkpoint_columns
from schema.tables import Attempt, Checkpoint, Input, Run

__all__ = ["NOT_KNOWN", "Rebuilt", "rebuild"]

NOT_KNOWN = "not in the footers: attempts, machines, devices, library versions, when a run ended"
_UNKNOWN = "unknown"
_OUTCOME = "rebuilt"


@dataclass(frozen=True)
class Rebuilt:
    """What became of the folder of a run.

    run: its number, None if it is not on record now. status: finished or interrupted; else why
    there is no run. left_out: what is wrong with each file that is not listed, by name.
    """

    folder: Path
    run: int | None
    status: str
    checkpoints: int
    records: int
    records_total: int
    left_out: dict[str, str]
    notes: list[str]
    is_fault: bool = False

    def describe(self) -> list[str]:
        """Return lines for people."""
        if self.run is None:
            return [f"{self.folder}: {self.status}"]
        done = f"{count(self.records)} of {counted(self.records_total, 'record')}"
        lines = [
            f"run {self.run} {self.status}: {counted(self.checkpoints, 'checkpoint')} with {done} "
            f"in {self.folder}"
        ]
        lines += [f"run {self.run}: {name}: left out: {why}" for name, why in self.left_out.items()]
        return lines + [f"run {self.run}: {note}" for note in self.notes]


@dataclass(frozen=True)
class _File:
    """A checkpoint file that was read to its end."""

    name: str
    footer: dict[str, Any]
    columns: pa.Schema
    records: int
    bytes: int
    sha256: str
    written_at: float

    @property
    def identity(self) -> dict[str, Any]:
        found = self.footer.get("identity")
        return found if isinstance(found, dict) else {}

    @property
    def positions(self) -> tuple[int, int]:
        return self.footer["first_position"], self.footer["stop_position"]


class _NotRebuiltError(Exception):
    """A folder whose run cannot be put on record; is_fault: not because it is on record already."""

    def __init__(self, fact: str, *, is_fault: bool = True) -> None:
        super().__init__(fact)
        self.is_fault = is_fault


def rebuild(url: str, output: Path, say: Callable[[str], None]) -> Iterator[Rebuilt]:
    """Put the runs on record whose folders lie in `output`, or the run whose folder it is.

    Every file is read to its end. Nothing that is on record is changed: a run whose uuid or number
    is there is left alone. Each run is one transaction, so that a rebuilding that was cut short can
    be run again. `say` is called with what `open_for_writing` says. Raises SettingsError if there
    is no folder with checkpoint files, MachineError if the disk or the database fails.
    """
    folders = _folders(output)
    if not folders:
        raise SettingsError(f"output folder {output}: no checkpoint file in it")
    path = database_path(url)
    with open_for_writing(url, say=say):
        pass
    # A run may name another as its source that is not there any more.
    with writing_engine(path, references=False) as engine:
        for folder in folders:
            try:
                yield _rebuilt(engine, path, folder)
            except _NotRebuiltError as error:
                yield Rebuilt(folder, None, str(error), 0, 0, 0, {}, [], error.is_fault)


def _folders(output: Path) -> list[Path]:
    """Return the folders with checkpoint files, by name."""
    with disk_errors(output):
        found = [output, *sorted(output.iterdir())] if output.is_dir() else []
        folders = [path for path in found if path.is_dir()]
    return [path for path in folders if _checkpoints(path)]


def _checkpoints(folder: Path) -> list[Path]:
    with disk_errors(folder):
        found = sorted(folder.iterdir())
    return [path for path in found if checkpoint_number(path.name) is not None]


def _rebuilt(engine: Engine, database: Path, folder: Path) -> Rebuilt:
    """Put the run of a folder on record."""
    if is_held(folder):
        raise _NotRebuiltError("a live process owns its run")
    files, left_out = _read(folder)
    try:
        run, config, inventory = _run(database, folder, files)
        checkpoints = _rows(run, config, files, inventory, left_out)
        for row in (run, *run.inputs, *checkpoints):
            check_types(run.id, row)
    except KeyError as error:
        raise _NotRebuiltError(f"footer lacks {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, LedgerError) as error:
        raise _NotRebuiltError(f"footer: {error}") from None
    notes = _notes(run, files, folder)
    try:
        _put_on_record(engine, database, run, config, files, checkpoints)
    except (AttributeError, OverflowError, TypeError) as error:
        raise _NotRebuiltError(f"footer: {error}") from None
    records = sum(row.records for row in checkpoints)
    return Rebuilt(
        folder, run.id, run.status, len(checkpoints), records, run.records_total, left_out, notes,
        is_fault=bool(left_out),
    )  # fmt: skip


def _put_on_record(
    engine: Engine,
    database: Path,
    run: Run,
    config: ESM2Config,
    files: list[_File],
    checkpoints: list[Checkpoint],
) -> None:
    """Add the rows of a run in one transaction; raises _NotRebuiltError if it is on record."""
    with transaction(engine) as session:
        _refuse_taken(session, run, files)
        run.model = model_row(session, config)
        session.add(run)
        session.flush()
        attempt = _attempt(run, database)
        session.add(attempt)
        session.flush()
        for row in checkpoints:
            row.attempt_id = attempt.id
            session.add(row)
        sources = [row.reused_run_id or 0 for row in checkpoints]
        # A number that a run has as its source is never given to another.
        session.execute(
            text("UPDATE sqlite_sequence SET seq = max(seq, :number) WHERE name = 'runs'"),
            {"number": max(sources, default=0)},
        )


def _read(folder: Path) -> tuple[list[_File], dict[str, str]]:
    """Read every checkpoint file; return those of the run that has most, and what is wrong else."""
    files, left_out = list[_File](), dict[str, str]()
    for path in _checkpoints(folder):
        try:
            files.append(_verified(path))
        except (ValueError, KeyError, TypeError) as error:
            left_out[path.name] = str(error)
    if not files:
        name, why = next(iter(left_out.items()))
        raise _NotRebuiltError(f"no whole checkpoint file; {name}: {why}")
    texts = [json.dumps(file.identity, sort_keys=True) for file in files]
    ((own, _),) = Counter(texts).most_common(1)
    for file, identity in zip(files, texts, strict=True):
        if identity != own:
            left_out[file.name] = f"made by run uuid {file.identity.get('uuid')}"
    return [file for file, one in zip(files, texts, strict=True) if one == own], left_out


def _verified(path: Path) -> _File:
    """Read a file to its end; raises ValueError with the first thing that is wrong with it."""
    with opened_unlisted(path) as file:
        found, footer, parquet = file.state, file.footer, file.parquet
        for group in range(parquet.num_row_groups):
            parquet.read_row_group(group, use_threads=False).validate(full=True)
        columns, records, digest = parquet.schema_arrow, parquet.metadata.num_rows, file.sha256()
    first, stop = footer.get("first_position"), footer.get("stop_position")
    if not (isinstance(first, int) and isinstance(stop, int) and 0 <= first < stop):
        raise ValueError("its footer names no positions")
    size, written_at = found.st_size, found.st_mtime
    return _File(path.name, footer, columns, records, size, digest, written_at)


def _run(
    database: Path, folder: Path, files: list[_File]
) -> tuple[Run, ESM2Config, Inventory | None]:
    """Return the row of a run, its model, and its input if that had to be counted."""
    footer = _best(files)
    identity, settings = dict(footer["identity"]), footer["settings"]
    if not isinstance(settings, dict):
        raise TypeError(f"settings are {type(settings).__name__}, not an object")
    config = load_snapshot(identity.get("esm2_config"))
    inventory = None if "totals" in footer else _inventory(footer, folder, database)
    totals = dict(footer["totals"]) if inventory is None else _totals(inventory, files)
    run = Run(
        id=footer["run"],
        **identity,
        **{name: totals[name] for name in TOTALS},
        settings=settings,
        output_folder=stored_path(folder, database),
        status="interrupted",
        inputs=_inputs(footer, inventory, folder, database),
        has_digests=True if EMBEDDED_SHA256 in files[0].columns.names else None,
    )
    run.input_path = run.inputs[0].path
    plan = folder / plan_name(run.uuid)
    if run.reuse_sha256 is not None and run.sequences_reused is None and plan.is_file():
        run.sequences_reused = pq.read_metadata(plan).num_rows
    return run, config, inventory


def _best(files: list[_File]) -> dict[str, Any]:
    """Return the footer that knows most: a run may have been begun by an older version."""
    return max((file.footer for file in files), key=lambda footer: "totals" in footer)


def _notes(run: Run, files: list[_File], folder: Path) -> list[str]:
    notes = []
    if "totals" not in _best(files):
        notes.append("its footers have no totals: counted in its input")
        notes.append("its footers have no started_at: the time of its oldest file")
    plan = folder / plan_name(run.uuid)
    if run.reuse_sha256 is not None and (
        not plan.is_file() or file_sha256(plan) != run.reuse_sha256
    ):
        notes.append(f"reuse plan {plan.name}: lost or altered, so that it cannot be resumed")
    return notes


def _inventory(footer: Mapping[str, Any], folder: Path, database: Path) -> Inventory:
    """Count the input of files older than totals; raises _NotRebuiltError if it is not there."""
    try:
        settings = from_snapshot(footer.get("settings"))
        paths = [str(path) for path in _input_paths(footer, folder, database)]
        found = preflight(override(settings, {"input.fasta": paths}).input)
    except LedgerError as error:
        raise _NotRebuiltError(f"footers without totals, and its input: {error}") from None
    if found.sha256 != footer["identity"]["input_sha256"]:
        raise _NotRebuiltError(f"footers without totals, and {found.name} is not its input")
    return found


def _totals(inventory: Inventory, files: list[_File]) -> dict[str, Any]:
    return {
        "input_bytes": inventory.bytes,
        "records_total": inventory.records,
        "sequences_total": inventory.sequences,
        "residues_total": inventory.residues,
        "records_truncated": inventory.truncated,
        "residues_mapped": inventory.mapped,
        "records_nucleotide_like": inventory.nucleotide_like,
        "records_with_gaps": inventory.with_gaps,
        "sequences_reused": None,
        "label": None,
        "started_at": _utc(min(file.written_at for file in files)),
    }


def _input_paths(footer: Mapping[str, Any], folder: Path, database: Path) -> list[Path]:
    """Return where the files of the input lie, as far as the footers know."""
    settings = footer.get("settings")
    listed = footer.get("inputs")
    if listed is None:
        assert isinstance(settings, dict)
        listed = [{"path": settings["input"]["fasta"]}]
    kept = kept_name(str(footer["identity"]["uuid"]))
    paths = []
    for one in listed:
        is_kept = Path(one["path"]).name == kept
        paths.append(folder / kept if is_kept else real_path(one["path"], settings, database))
    return paths


def _inputs(
    footer: Mapping[str, Any], inventory: Inventory | None, folder: Path, database: Path
) -> list[Input]:
    paths = [stored_path(path, database) for path in _input_paths(footer, folder, database)]
    if inventory is not None:
        return [
            Input(
                run_id=footer["run"], number=number, path=path, sha256=file.sha256,
                bytes=file.bytes, first_record=file.first_record, records=file.records,
            )
            for number, (path, file) in enumerate(zip(paths, inventory.files, strict=True))
        ]  # fmt: skip
    keys = ("sha256", "bytes", "first_record", "records")
    return [
        Input(run_id=footer["run"], number=number, path=path, **{key: one[key] for key in keys})
        for number, (path, one) in enumerate(zip(paths, footer["inputs"], strict=True))
    ]


def _rows(
    run: Run,
    config: ESM2Config,
    files: list[_File],
    inventory: Inventory | None,
    left_out: dict[str, str],
) -> list[Checkpoint]:
    """Return a row for each file that belongs to the run, and tell whether that is all of it."""
    columns = checkpoint_columns(
        run.include, run.repr_layers, config.hidden_dim, run.per_tok_dtype,
        digests=bool(run.has_digests),
    )  # fmt: skip
    lengths = None if inventory is None else inventory.lengths
    rows: list[Checkpoint] = []
    covered = 0
    for file in sorted(files, key=lambda one: one.positions):
        first, stop = file.positions
        if not file.columns.equals(columns):
            left_out[file.name] = "its columns are not those of the run"
        elif stop > run.sequences_total or (rows and first < rows[-1].stop_position):
            left_out[file.name] = f"positions {first} to {stop} of {run.sequences_total}"
        else:
            # Of version 1, whose footers do not tell: it copied nothing.
            counted = 0 if lengths is None else int(lengths[first:stop].sum(dtype=np.int64))
            rows.append(_row(run, file, counted))
            covered += stop - first
    records = sum(row.records for row in rows)
    if (covered, records) == (run.sequences_total, run.records_total):
        run.status = "finished"
    return rows


def _row(run: Run, file: _File, counted: int) -> Checkpoint:
    """Return the row of a file; counted: its residues, if its footer does not tell."""
    reused = file.footer.get("reused") or {}
    first, stop = file.positions
    return Checkpoint(
        run_id=run.id,
        attempt_id=0,  # not known yet
        path=file.name,
        first_position=first,
        stop_position=stop,
        records=file.records,
        residues=file.footer.get("residues", counted),
        seconds=float(file.footer.get("seconds", 0.0)),
        bytes=file.bytes,
        sha256=file.sha256,
        esm2_config=run.esm2_config,
        committed_at=utc_now(),
        reused_run_id=reused.get("run"),
        residues_reused=reused.get("residues"),
    )


def _refuse_taken(session: Session, run: Run, files: list[_File]) -> None:
    """Raise _NotRebuiltError for a run that is on record, or that would be taken for another."""
    found = session.scalar(select(Run.id).where(Run.uuid == run.uuid))
    if found is not None:
        raise _NotRebuiltError(f"run {found} is on record already", is_fault=False)
    wanted = {run.id: run.uuid}
    for file in files:
        reused = file.footer.get("reused")
        if isinstance(reused, dict):
            wanted[reused["run"]] = reused["uuid"]
    for number, uuid in wanted.items():
        there = session.scalar(select(Run.uuid).where(Run.id == number))
        if there is not None and there != uuid:
            raise _NotRebuiltError(f"run {number} of uuid {uuid}: run {number} here is {there}")


def _attempt(run: Run, database: Path) -> Attempt:
    """Return an attempt that stands for all that there were; its times are those of the record."""
    model = (run.settings or {}).get("model", {})
    weights = str(model.get("esm_model", _UNKNOWN))
    if Path(weights).is_absolute():
        weights = stored_path(real_path(weights, run.settings, database), database)
    now = utc_now()
    return Attempt(
        run_id=run.id, host=_UNKNOWN, pid=0, weights_path=weights,
        device=_UNKNOWN, device_name=_UNKNOWN, threads=0, tokens_per_pack=0, versions={},
        started_at=now, heartbeat_at=now, ended_at=now, outcome=_OUTCOME,
    )  # fmt: skip


def _utc(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
