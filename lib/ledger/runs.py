"""Runs on the record: made, owned by one process at a time, advanced by checkpoints, ended."""

from __future__ import annotations

import os
import platform
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session, selectinload
from sqlalchemy.orm.attributes import set_committed_value

from lib.errors import IdentityRefusedError, InterruptedRunError, MachineError, SettingsError
from lib.files import disk_errors
from lib.ledger.attempts import AttemptFacts
from lib.ledger.claims import claim_folder, made_for_another
from lib.ledger.database import transaction, utc_now
from lib.ledger.history import refuse_pruned
from lib.ledger.identity import settings_identity
from lib.ledger.ownership import HeldError, is_held, take_lock
from lib.ledger.places import (
    StoredRun,
    given_folder,
    real_path,
    real_settings,
    stored_path,
)
from lib.ledger.reuse_plan import ReusePlan, plan_path, write_plan
from lib.ledger.standard_input import drop_names, keep_in_folder, kept_name, remove_unlisted
from lib.ledger.whereabouts import write_folder, write_input
from lib.sequences.inventory import Inventory
from lib.sequences.plan import PLAN
from lib.settings import Settings, snapshot
from schema.esm2_config import ESM2Config
from schema.tables import Attempt, Base, Checkpoint, Input, Model, Run, Worker

__all__ = [
    "Ownership",
    "beat",
    "check_types",
    "checked_label",
    "create_run",
    "end_attempt",
    "end_lost_attempts",
    "finish_run",
    "hold_lock",
    "load_run",
    "model_row",
    "own",
    "owned_by_another",
    "show_alive",
    "start_attempt",
    "unfinished_runs",
]

# Columns of `models` that follow from the digest, and that a row of an older version may lack.
_KNOWN_LATER = ("released", "base_name", "base_sha256")
_LONGEST_LABEL = 60
_LARGEST_LIST = 2**31 - 1  # Arrow's lists are counted by int32


@dataclass(frozen=True)
class Ownership:
    """A run that this process holds the lock of, and its attempt at it.

    `run` is kept as the database has it: its status, and its checkpoints as they are committed.
    """

    run: Run
    attempt_id: int


def checked_label(text: str | None) -> str | None:
    """Return a label without blanks around it, None if nothing is left.

    Raises SettingsError for one that does not fit into a line of the history.
    """
    label = (text or "").strip()
    if len(label) > _LONGEST_LABEL:
        raise SettingsError(f"label: {len(label)} characters, at most {_LONGEST_LABEL}")
    if not label.isprintable():
        raise SettingsError(f"label {label!r}: not in one line of printable characters")
    return label or None


@contextmanager
def create_run(
    engine: Engine,
    settings: Settings,
    config: ESM2Config,
    inventory: Inventory,
    facts: AttemptFacts,
    reuse: ReusePlan | None = None,
    label: str | None = None,
) -> Iterator[Ownership]:
    """Record a new run with its folder, its first attempt and this process as its owner.

    reuse: what it copies from earlier runs; that plan is on disk before the run is on record.
    label: what its user calls it. All of it appears in one transaction or not at all; what leaves
    the block early is recorded as the attempt's end. A copy of standard input moves into the
    folder. The run gets the next number whose folder is free. Raises SettingsError for contacts
    that no checkpoint can hold.
    """
    _refuse_large_contacts(settings, inventory)
    database = Path(engine.url.database or "")
    with ExitStack() as undone, transaction(engine) as session:
        name = str(uuid.uuid4())
        output = Path(settings.output.folder)
        _tidy(session, output, database)
        number, folder, lock = claim_folder(session, database, output, name)
        undone.enter_context(lock)
        temporary = keep_in_folder(inventory, folder, name)
        if temporary:
            undone.callback(drop_names, [folder / kept_name(name)])
        run = Run(
            id=number,
            uuid=name,
            model=model_row(session, config),
            checkpoints=[],
            esm2_config=config.snapshot(),
            repr_layers=list(config.repr_layers),
            **settings_identity(settings),
            plan=PLAN,
            input_path=str(inventory.files[0].source.path),
            input_bytes=inventory.bytes,
            input_sha256=inventory.sha256,
            records_total=inventory.records,
            sequences_total=inventory.sequences,
            residues_total=inventory.residues,
            records_truncated=inventory.truncated,
            residues_mapped=inventory.mapped,
            records_nucleotide_like=inventory.nucleotide_like,
            records_with_gaps=inventory.with_gaps,
            label=label,
            output_folder=str(folder),
            settings=snapshot(settings),
            status="running",
            started_at=utc_now(),
            has_digests=True,
        )
        session.add(run)
        session.flush()
        run.inputs = _inputs(inventory, database)
        run.input_path = run.inputs[0].path
        if reuse is not None:
            run.sequences_reused = len(reuse)
            run.reuse_sha256 = write_plan(reuse, plan_path(run))
        run.output_folder = stored_path(folder, database)
        attempt = _attempt(run.id, facts, database)
        session.add(attempt)
        undone.pop_all()  # a commit that fails may have put the run on record
    drop_names(temporary)
    _locate(run, database)
    with lock, _ended_on_the_record(engine, Ownership(run, attempt.id)) as ownership:
        yield ownership


@contextmanager
def own(
    engine: Engine, run_id: int | None, output: Path | None = None, *, make_folder: bool = False
) -> Iterator[Run]:
    """Hold the lock of a run, or of the newest unfinished one, and give the run as it then is.

    output: as in `load_run`; make_folder: make its folder if it is not there any more. Raises
    SettingsError if there is none or it is pruned, MachineError as `hold_lock` does or without its
    folder, and what `given_folder` raises.
    """
    found, folder = _find(engine, run_id, output)
    if make_folder:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise MachineError(f"run {found}: output folder {folder}: no such folder")
    with hold_lock(engine, found, folder):
        run = load_run(engine, found, output)
        refuse_pruned(run.id, run.pruned_at)
        yield run


@contextmanager
def hold_lock(engine: Engine, run_id: int, folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Raises MachineError if a live process has it, or that of the folder on record, whom it names, or
    the folder does not allow it.
    """
    try:
        lock = take_lock(folder)
    except HeldError:
        raise owned_by_another(load_run(engine, run_id)) from None
    with lock:
        with transaction(engine) as session:
            run = session.get_one(Run, run_id)
            is_held_elsewhere = _is_held_elsewhere(run, folder, Path(engine.url.database or ""))
        if is_held_elsewhere:
            raise owned_by_another(load_run(engine, run_id))
        yield


def _is_held_elsewhere(run: Run, folder: Path, database: Path) -> bool:
    """Return whether a live process works in the folder on record; False if that is `folder`.

    run: as its row is now.
    """
    stored = StoredRun(run.id, run.uuid, run.output_folder, run.settings)
    on_record = stored.folder(database)
    with suppress(OSError):  # it is not there
        if on_record.samefile(folder):
            return False
    return is_held(on_record) is True


def owned_by_another(run: Run) -> MachineError:
    """Return the error for a run that a live process owns, whom it names."""
    return MachineError(f"run {run.id}: {_owner(run)}")


@contextmanager
def start_attempt(
    engine: Engine,
    run: Run,
    facts: AttemptFacts,
    inventory: Inventory,
    dropped: Sequence[Checkpoint] = (),
) -> Iterator[Ownership]:
    """Record a further attempt at a run whose lock is held, and its end if the block fails.

    `dropped` checkpoints are taken off the record in the same transaction, so that a run never
    looks finished without them. Attempts that ended without a word are marked as lost: their
    lock was free. The folder that the run is continued in becomes the one on record, where others
    look for its lock, and the files that `inventory` was read from become its input there. Raises
    SettingsError if the run was pruned meanwhile, MachineError if another process has begun to
    continue it in another folder.
    """
    database, folder = Path(engine.url.database or ""), Path(run.output_folder)
    paths = _input_paths(run, inventory)
    with transaction(engine) as session:
        _refuse_taken(session, run.id, folder, database)
        write_folder(session, run.id, folder, database)
        write_input(session, run.id, paths, database)
        session.execute(delete(Checkpoint).where(Checkpoint.id.in_([one.id for one in dropped])))
        end_lost_attempts(session, run.id)
        of_run = select(Attempt.id).where(Attempt.run_id == run.id)
        session.execute(
            update(Worker)
            .where(Worker.attempt_id.in_(of_run), Worker.outcome.is_(None))
            .values(outcome="lost")
        )
        session.execute(
            update(Run).where(Run.id == run.id).values(status="running", finished_at=None)
        )
        attempt = _attempt(run.id, facts, database)
        session.add(attempt)
    run.status = "running"
    for file, path in zip(run.inputs, paths, strict=True):
        set_committed_value(file, "path", str(path))
    set_committed_value(run, "input_path", str(paths[0]))
    for checkpoint in dropped:
        run.checkpoints.remove(checkpoint)
    with _ended_on_the_record(engine, Ownership(run, attempt.id)) as ownership:
        yield ownership


def _input_paths(run: Run, inventory: Inventory) -> list[Path]:
    """Return where the input of a run lies; the copy of standard input stays the one it kept."""
    name, paths = kept_name(run.uuid), []
    for file, found in zip(run.inputs, inventory.files, strict=True):
        path = Path(file.path)
        paths.append(path if path.name == name and path.exists() else found.source.path)
    return paths


def _refuse_taken(session: Session, run_id: int, folder: Path, database: Path) -> None:
    """Refuse a run that has been pruned, or continued in another folder, since it was loaded."""
    run = session.get_one(Run, run_id)
    refuse_pruned(run.id, run.pruned_at)
    if _is_held_elsewhere(run, folder, database):
        raise owned_by_another(run)


def end_lost_attempts(session: Session, run_id: int) -> None:
    """Record attempts that ended without a word as lost, at the time of their last sign of life."""
    committed = select(func.max(Checkpoint.committed_at)).where(Checkpoint.attempt_id == Attempt.id)
    last = func.max(Attempt.heartbeat_at, func.coalesce(committed.scalar_subquery(), ""))
    session.execute(
        update(Attempt)
        .where(Attempt.run_id == run_id, Attempt.ended_at.is_(None))
        .values(ended_at=last, outcome="lost")
    )


def beat(engine: Engine, ownership: Ownership) -> None:
    """Say that this attempt is alive; raises as `show_alive` does."""
    with transaction(engine) as session:
        show_alive(session, ownership)


def show_alive(session: Session, ownership: Ownership) -> None:
    """Write the time of the attempt's last sign of life.

    Only the newest attempt at a run owns it, and only until it ends. Raises MachineError if
    another process has taken the run over, or pruned it, as it can where a file lock does not
    reach.
    """
    run_id, attempt_id = ownership.run.id, ownership.attempt_id
    newest = session.scalar(select(func.max(Attempt.id)).where(Attempt.run_id == run_id))
    alive = (Attempt.id == attempt_id) & Attempt.ended_at.is_(None)
    found = session.scalar(
        update(Attempt).where(alive).values(heartbeat_at=utc_now()).returning(Attempt.id)
    )
    if newest == attempt_id and found is None and _is_pruned(session, run_id):
        raise MachineError(f"run {run_id}: attempt {attempt_id} has lost it: it was pruned")
    if newest != attempt_id or found is None:
        raise MachineError(f"run {run_id}: attempt {attempt_id} has lost it to attempt {newest}")


def _is_pruned(session: Session, run_id: int) -> bool:
    return session.scalar(select(Run.pruned_at).where(Run.id == run_id)) is not None


def finish_run(engine: Engine, ownership: Ownership) -> None:
    """Record a run as finished by this attempt; raises as `show_alive` does."""
    beat(engine, ownership)
    end_attempt(engine, ownership, "finished", None)


def end_attempt(engine: Engine, ownership: Ownership, outcome: str, error: str | None) -> None:
    """Record how this attempt ended, and with it the run: finished, interrupted or failed.

    An attempt ends once: what happens after it has finished, or after another process has taken
    the run over, changes nothing.
    """
    with transaction(engine) as session:
        now = utc_now()
        ended = session.scalar(
            update(Attempt)
            .where(Attempt.id == ownership.attempt_id, Attempt.ended_at.is_(None))
            .values(ended_at=now, heartbeat_at=now, outcome=outcome, error=error)
            .returning(Attempt.id)
        )
        if ended is None:
            return
        finished = {"finished_at": now} if outcome == "finished" else {}
        session.execute(
            update(Run).where(Run.id == ownership.run.id).values(status=outcome, **finished)
        )
    ownership.run.status = outcome


@contextmanager
def _ended_on_the_record(engine: Engine, ownership: Ownership) -> Iterator[Ownership]:
    """Record what a block raises as the end of the attempt: while it lives, none stays open."""
    try:
        yield ownership
    except BaseException as error:
        outcome = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
        # If the database is what failed, the next attempt marks this one as lost.
        with suppress(MachineError):
            end_attempt(engine, ownership, outcome, str(error) or type(error).__name__)
        raise


def load_run(engine: Engine, run_id: int, output: Path | None = None) -> Run:
    """Return a run with its model, attempts and checkpoints; its paths are those of today.

    output: where its folder lies, if not where the database says. Raises SettingsError if there is
    none, IdentityRefusedError if a row is not readable, and what `given_folder` raises.
    """
    try:
        with transaction(engine) as session:
            run = session.scalar(
                select(Run)
                .where(Run.id == run_id)
                .options(
                    selectinload(Run.model),
                    selectinload(Run.inputs),
                    selectinload(Run.attempts),
                    selectinload(Run.checkpoints).selectinload(Checkpoint.attempt),
                )
            )
    except (ValueError, RecursionError) as error:  # a JSON column that holds no JSON, or too deep
        raise IdentityRefusedError(f"run {run_id}: metadata is not JSON: {error}") from None
    if run is None:
        raise SettingsError(f"run {run_id}: not in database {engine.url.database}")
    models = [run.model] if run.model is not None else []
    for row in (run, *models, *run.inputs, *run.attempts, *run.checkpoints):
        check_types(run_id, row)
    database = Path(engine.url.database or "")
    _locate(run, database, output)
    for attempt in run.attempts:
        path = real_path(attempt.weights_path, run.settings, database)
        set_committed_value(attempt, "weights_path", str(path))
    if isinstance(run.settings, dict):
        set_committed_value(run, "settings", real_settings(run.settings, database))
    return run


def _locate(run: Run, database: Path, output: Path | None = None) -> None:
    """Put the paths of today in the place of stored ones; the database is not written to."""
    stored = StoredRun(run.id, run.uuid, run.output_folder, run.settings)
    folder = stored.folder(database) if output is None else given_folder(stored, output)
    set_committed_value(run, "output_folder", str(folder))
    for file in run.inputs:
        set_committed_value(file, "path", str(stored.path(file.path, database, folder)))
    first = stored.path(run.input_path, database, folder)
    set_committed_value(run, "input_path", str(first))


def unfinished_runs(engine: Engine) -> list[int]:
    """Return the numbers of unfinished runs that can be continued, newest first."""
    query = select(Run.id).where(Run.status != "finished", Run.pruned_at.is_(None))
    with transaction(engine) as session:
        return list(session.scalars(query.order_by(Run.id.desc())))


def _find(engine: Engine, run_id: int | None, output: Path | None) -> tuple[int, Path]:
    """Return the number and the folder of a run, or of the newest unfinished one.

    Raises SettingsError if there is none or it is pruned, and what `given_folder` raises.
    """
    if run_id is None:
        numbers = unfinished_runs(engine)
        if not numbers:
            raise SettingsError(f"no unfinished run in database {engine.url.database}")
        run_id = numbers[0]
    run = load_run(engine, run_id, output)
    refuse_pruned(run.id, run.pruned_at)
    return run_id, Path(run.output_folder)


def check_types(run_id: int, row: Base) -> None:
    """Refuse text where a number belongs, and the like: SQLite keeps whatever it is given."""
    for column in row.__table__.columns:
        value, kind = getattr(row, column.name), column.type.python_type
        wanted = (int, float) if kind is float else kind
        may_be_missing = column.nullable or column.primary_key  # a new row gets its number later
        if value is None and may_be_missing:
            continue
        if not isinstance(value, wanted):
            raise IdentityRefusedError(
                f"run {run_id}: {row.__tablename__}.{column.name} is {value!r:.80}, "
                f"not {kind.__name__}"
            )


def model_row(session: Session, config: ESM2Config) -> Model:
    """Return the row of this model, made if it is new.

    What an older row does not know yet, as that the weights are released, is filled in.
    """
    values = config.weights_snapshot()
    later = {key: values.pop(key) for key in _KNOWN_LATER if key in values}
    found = session.scalar(select(Model).filter_by(**values))
    if found is not None:
        for key, value in later.items():
            setattr(found, key, value)
        return found
    model = Model(**values, **later)
    session.add(model)
    session.flush()
    return model


def _inputs(inventory: Inventory, database: Path) -> list[Input]:
    return [
        Input(
            number=number,
            path=stored_path(file.source.path, database),
            sha256=file.sha256,
            bytes=file.bytes,
            first_record=file.first_record,
            records=file.records,
        )
        for number, file in enumerate(inventory.files)
    ]


def _attempt(run_id: int, facts: AttemptFacts, database: Path) -> Attempt:
    now = utc_now()
    return Attempt(
        run_id=run_id,
        host=socket.gethostname(),
        pid=os.getpid(),
        weights_path=stored_path(facts.weights_path, database),
        device=facts.device,
        device_name=facts.device_name,
        threads=facts.threads,
        tokens_per_pack=facts.tokens_per_pack,
        versions=_versions() | ({"attention": facts.attention} if facts.attention else {}),
        started_at=now,
        heartbeat_at=now,
    )


@cache
def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "pyarrow", "sqlalchemy")
    return {"python": platform.python_version()} | {one: version(one) for one in packages}


def _owner(run: Run) -> str:
    if not run.attempts:
        return "owned by another process"
    last = run.attempts[-1]
    return f"owned by process {last.pid} on {last.host} since {last.started_at}"


def _refuse_large_contacts(settings: Settings, inventory: Inventory) -> None:
    longest = inventory.longest
    if settings.input.long_sequences == "truncate":
        longest = min(longest, settings.input.max_residues)
    if "contacts" in settings.output.include and longest**2 > _LARGEST_LIST:
        raise SettingsError(
            f"include contacts: {longest} residues have {longest**2} contacts, a list of a "
            f"checkpoint holds {_LARGEST_LIST}"
        )


def _tidy(session: Session, output: Path, database: Path) -> None:
    """Remove what starts that died have left of standard input in an output folder."""

    def is_listed(copy: Path, uuid_start: str) -> bool:
        its = Run.uuid.startswith(uuid_start, autoescape=True)
        read = Run.inputs.any(Input.path.in_([str(copy), stored_path(copy, database)]))
        here = session.scalar(select(Run.id).where(its | read).limit(1))
        return here is not None or made_for_another(copy.parent, database) is not None

    with disk_errors(output):
        remove_unlisted(output, is_listed)
