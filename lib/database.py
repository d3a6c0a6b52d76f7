"""The run database as a file: opened for writing or reading only, checked for being ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.orm import Session

from lib.errors import MachineError, SettingsError
from schema.tables import APPLICATION_ID, SCHEMA_VERSION, Base, SchemaVersion

__all__ = [
    "WRITER",
    "database_path",
    "open_for_reading",
    "open_for_writing",
    "transaction",
    "utc_now",
]

WRITER = "esm-ledger 0.1.0"
_BUSY_SECONDS = 60


def utc_now() -> str:
    """Return the time as UTC ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def database_path(url: str) -> Path:
    """Return the SQLite file that a path or SQLAlchemy URL names; refuse other databases."""
    if "://" not in url:
        return Path(url)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(f"database {url}: not a SQLAlchemy URL") from None
    if parsed.get_backend_name() != "sqlite":
        raise SettingsError(f"database {url}: {parsed.get_backend_name()}, not sqlite")
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise SettingsError(f"database {url}: names no file")
    return Path(parsed.database).absolute()


def open_for_writing(url: str, *, create: bool = True) -> Engine:
    """Open the run database, making it if there is none unless `create` is false.

    Raises SettingsError for another program's database or schema version, MachineError if
    SQLite cannot work there.
    """
    path = database_path(url)
    if not create and not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    engine = _engine(URL.create("sqlite", database=str(path)))
    with sqlite_errors(path):
        if not path.parent.is_dir():
            raise MachineError(f"database {path}: folder {path.parent} does not exist")
        _refuse_strangers(path)
        _use_wal(path)
        with engine.begin() as connection:
            # Under the write lock, so that two first starts make it once.
            if _version(connection) is None:
                _create(connection)
    return engine


def open_for_reading(url: str) -> Engine:
    """Open the run database read-only; raises SettingsError if there is none."""
    path = database_path(url)
    if not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    _refuse_strangers(path)
    location = f"file:{_quoted(path)}"
    url_read_only = URL.create("sqlite", database=location, query={"mode": "ro", "uri": "true"})
    engine = _engine(url_read_only)

    @event.listens_for(engine, "connect")
    def _query_only(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")
        # A read-only connection would still make a file for ATTACH or VACUUM INTO.
        connection.set_authorizer(_refuse_attach)

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """Open a session in one transaction: committed at the end, rolled back on any error."""
    path = Path(engine.url.database or "")
    with sqlite_errors(path), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite reports into a MachineError of one line."""
    try:
        yield
    except DatabaseError as error:
        raise MachineError(f"database {path}: {error.orig}") from None
    except sqlite3.Error as error:
        raise MachineError(f"database {path}: {error}") from None


def _engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # pysqlite would begin transactions of its own accord, and only before writes.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads_only = connection.engine.url.query.get("mode") == "ro"
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine


def _refuse_attach(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else sqlite3.SQLITE_OK


def _use_wal(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise MachineError(f"database {path}: journal mode is {mode}, WAL does not work there")


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _refuse_strangers(path: Path) -> None:
    """Refuse a database that is not ours, or of another version, before anything is written."""
    if not path.exists() or path.stat().st_size == 0:
        return
    engine = _engine(
        URL.create("sqlite", database=f"file:{_quoted(path)}", query={"mode": "ro", "uri": "true"})
    )
    try:
        with sqlite_errors(path), engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA application_id").scalar()
            tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").scalar()
            if found == 0 and tables == 0:
                return
            if found != APPLICATION_ID:
                raise SettingsError(
                    f"database {path}: application_id {found:#x} is another program's, "
                    f"esm-ledger's is {APPLICATION_ID:#x}"
                )
            version = _version(connection)
            if version != SCHEMA_VERSION:
                raise SettingsError(
                    f"database {path}: schema version {version}, this program's is {SCHEMA_VERSION}"
                )
    finally:
        engine.dispose()


def _version(connection: Connection) -> int | None:
    exists = "SELECT count(*) FROM sqlite_schema WHERE name = 'schema_version'"
    if not connection.exec_driver_sql(exists).scalar():
        return None
    found = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar()
    return int(found) if found is not None else None


def _create(connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    Base.metadata.create_all(connection)
    views = files("schema").joinpath("views.sql").read_text(encoding="utf-8")
    for statement in views.split(";\n"):
        if "CREATE VIEW" in statement:
            connection.exec_driver_sql(statement)
    version = {"version": SCHEMA_VERSION, "created_at": utc_now(), "writer": WRITER}
    connection.execute(insert(SchemaVersion), version)
