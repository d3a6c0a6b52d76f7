"""The run database under SQLAlchemy: made if it is not there, and worked on in transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, insert
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
    refuse_strangers,
    sqlite_errors,
)
from lib.ledger.statements import read_statements
from schema.tables import Base, SchemaVersion
from schema.version import APPLICATION_ID, SCHEMA_VERSION, WRITER

__all__ = ["open_for_reading", "open_for_writing", "transaction", "utc_now"]


def utc_now() -> str:
    """Return the time as UTC ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def open_for_writing(url: str, *, create: bool = True) -> Iterator[Engine]:
    """Open the run database until the end of the block; make it if `create` and there is none.

    Raises SettingsError for another program's database or schema version, MachineError if
    SQLite cannot work there.
    """
    path = database_path(url)
    if not create and not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    if not path.parent.is_dir():
        raise MachineError(f"database {path}: folder {path.parent} does not exist")
    refuse_strangers(path, may_write=True)
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_SECONDS}
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # pysqlite would begin transactions of its own accord, and only before writes.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with _database_errors(path):
            _use_wal(path)
            with engine.begin() as connection:
                # Under the write lock, so that two first starts make it once.
                exists = "SELECT count(*) FROM sqlite_schema WHERE name = 'schema_version'"
                if not connection.exec_driver_sql(exists).scalar():
                    _create(connection)
        yield engine.execution_options(file=_file(path))
    finally:
        engine.dispose()


def open_for_reading(url: str) -> Engine:
    """Open the run database read-only; raises SettingsError if there is none."""
    path = database_path(url)
    connect_read_only(path).close()
    place = URL.create("sqlite", database=str(path))
    return create_engine(place, creator=lambda: connect_read_only(path), poolclass=NullPool)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session in one transaction: committed at the end, rolled back on any error.

    Raises MachineError for what SQLite reports, and if the file is not there any more or another
    has taken its place.
    """
    path = Path(engine.url.database or "")
    # SQLite goes on writing to a file that has lost its name, and all of it is gone at the end.
    try:
        found = _file(path)
    except OSError as error:
        raise MachineError(f"database {path}: {error.strerror}") from None
    if found != engine.get_execution_options().get("file", found):
        raise MachineError(f"database {path}: another file has taken its place")
    with (
        _database_errors(path),
        Session(engine, expire_on_commit=False) as session,
        session.begin(),
    ):
        yield session


@contextmanager
def _database_errors(path: Path) -> Iterator[None]:
    try:
        with sqlite_errors(path):
            yield
    except DatabaseError as error:
        raise MachineError(f"database {path}: {error_fact(error.orig)}") from None


def _file(path: Path) -> tuple[int, int]:
    """Return what stays the same of a file that is written to, and is another file's own."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _use_wal(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise MachineError(f"database {path}: journal mode is {mode}, WAL does not work there")


def _create(connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    Base.metadata.create_all(connection)
    for view in read_statements("views.sql"):
        connection.exec_driver_sql(view.sql)
    version = {"version": SCHEMA_VERSION, "created_at": utc_now(), "writer": WRITER}
    connection.execute(insert(SchemaVersion), version)
