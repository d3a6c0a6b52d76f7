"""The run database under SQLAlchemy: made if it is not there, and worked on in transactions."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, create_engine, event, insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from lib.errors import MachineError, SettingsError
from lib.ledger.sqlite_file import (
    BUSY_SECONDS,
    connect_read_only,
    database_path,
    error_fact,
    leave_wal,
    raise_ctrl_c,
    refuse_empty,
    refuse_strangers,
    refuse_unwritable,
    sqlite_errors,
)
from lib.ledger.statements import read_statements
from schema.tables import Base, SchemaVersion
from schema.version import APPLICATION_ID, SCHEMA_VERSION, WRITER

__all__ = [
    "database_errors",
    "make_views",
    "open_for_reading",
    "open_for_writing",
    "transaction",
    "utc_ago",
    "utc_now",
    "writing_engine",
]

_PAUSE_SECONDS = 0.01
_SYNCHRONOUS = "FULL"  # what is committed survives a power cut
# What SQLAlchemy makes of a statement, by statement: a notebook opens its database for each run.
_COMPILED: dict[Any, Any] = {}


def utc_now() -> str:
    """Return the time as UTC ISO 8601 with milliseconds."""
    return utc_ago(timedelta())


def utc_ago(age: timedelta) -> str:
    """Return the time that was so long ago, as `utc_now` does: as texts, such times compare."""
    moment = datetime.now(UTC) - age
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def open_for_writing(
    url: str, *, create: bool = True, say: Callable[[str], None] = lambda _: None
) -> Iterator[Engine]:
    """Open the run database until the end of the block; make it if `create` and there is none.

    `say` is told if the file system does not allow WAL. Raises SettingsError for another program's
    database or schema version, MachineError if SQLite cannot work there.
    """
    path = database_path(url)
    if not create and not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    if not path.parent.is_dir():
        raise MachineError(f"database {path}: folder {path.parent} does not exist")
    refuse_unwritable(path)
    refuse_strangers(path, may_write=True)
    with suppress(OSError):  # which SQLite reports; by itself it would let only the owner write
        path.touch(0o666, exist_ok=False)
    with writing_engine(path) as engine:
        with database_errors(path):
            mode = _choose_journal(path)
            with engine.begin() as connection:
                # Under the write lock, so that two first starts make it once.
                exists = "SELECT count(*) FROM sqlite_schema WHERE name = 'schema_version'"
                if not connection.exec_driver_sql(exists).scalar():
                    _create(connection)
        if mode != "wal":
            say(f"database {path}: journal mode {mode}, WAL does not work there")
        yield engine.execution_options(file=_file(path))


@contextmanager
def writing_engine(path: Path, *, references: bool = True) -> Iterator[Engine]:
    """Give an engine whose transactions take the write lock when they begin.

    references: whether a row may only refer to rows that are there.
    """
    engine = _engine(path, connect_args={"timeout": BUSY_SECONDS})
    opened: list[sqlite3.Connection] = []

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        opened.append(connection)
        # pysqlite would begin transactions of its own accord, and only before writes.
        connection.isolation_level = None
        connection.execute(f"PRAGMA foreign_keys = {'ON' if references else 'OFF'}")
        connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
        # Each commit moves the log into the one file, so that a copy of it after a kill is whole.
        connection.execute("PRAGMA wal_autocheckpoint = 1")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        yield engine
    finally:
        engine.dispose()
        # One that a signal's exception has torn from SQLAlchemy lives as long as its traceback, in
        # a notebook until the next one, and with it the write lock.
        for connection in opened:
            connection.close()


def _engine(path: Path, **how: Any) -> Engine:  # noqa: ANN401
    """Return an engine that compiles no statement that an earlier one of this process did."""
    place = URL.create("sqlite", database=str(path))
    engine = create_engine(place, execution_options={"compiled_cache": _COMPILED}, **how)
    engine.dialect = _dialect()
    return engine


@cache
def _dialect() -> Dialect:
    """Return the dialect of every engine: what is compiled belongs to one."""
    engine = create_engine("sqlite://")
    engine.connect().close()  # which tells the dialect what this SQLite can do
    engine.dispose()
    return engine.dialect


def open_for_reading(url: str) -> Engine:
    """Open the run database read-only; raises SettingsError if there is none, or it is empty."""
    path = database_path(url)
    connect_read_only(path).close()
    refuse_empty(path)
    return _engine(path, creator=lambda: connect_read_only(path), poolclass=NullPool)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session in one transaction: committed at the end, rolled back on any error.

    Raises MachineError for what SQLite reports, and if the file is not there any more or another
    has taken its place.
    """
    path = Path(engine.url.database or "")
    # SQLite keeps writing to an unlinked file; the data vanishes on close.
    try:
        found = _file(path)
    except OSError as error:
        raise MachineError(f"database {path}: {error.strerror}") from None
    if found != engine.get_execution_options().get("file", found):
        raise MachineError(f"database {path}: another file has taken its place")
    with (
        database_errors(path),
        Session(engine, expire_on_commit=False) as session,
        session.begin(),
    ):
        yield session


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite reports, also by way of SQLAlchemy, into a MachineError of one line."""
    try:
        with sqlite_errors(path):
            yield
    except DatabaseError as error:
        raise_ctrl_c(error.orig)
        raise MachineError(f"database {path}: {error_fact(error.orig)}") from None


def _file(path: Path) -> tuple[int, int]:
    """Return device and inode: writing does not change them, and another file has others."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _choose_journal(path: Path) -> str:
    """Use WAL where the file system allows it, else a rollback journal; return the journal mode."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _ask_for_wal(path)
        except sqlite3.OperationalError as error:
            # Another first start is changing the mode, which SQLite does not wait for by itself.
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() >= until:
                raise
            time.sleep(_PAUSE_SECONDS)


def _ask_for_wal(path: Path) -> str:
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode == "wal":  # the first read maps the memory that processes share
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_IOERR_SHMMAP":
                raise
    return leave_wal(path)


def make_views(connection: Connection) -> None:
    """Make the views of schema/views.sql."""
    for view in read_statements("views.sql"):
        connection.exec_driver_sql(view.sql)


def _create(connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    Base.metadata.create_all(connection, checkfirst=False)
    make_views(connection)
    version = {"version": SCHEMA_VERSION, "created_at": utc_now(), "writer": WRITER}
    connection.execute(insert(SchemaVersion), version)
