"""Migration: an older run database is backed up and brought to this program's schema version."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from itertools import zip_longest
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, insert

from lib.errors import LedgerError, MachineError, SettingsError
from lib.files import disk_errors, new_path
from lib.ledger.comments import view_comments
from lib.ledger.database import database_errors, make_views, utc_now, writing_engine
from lib.ledger.sqlite_file import (
    KNOWN_VERSIONS,
    connect_read_only,
    database_path,
    refuse_strangers,
    refuse_unwritable,
    schema_version,
    sqlite_errors,
)
from schema.tables import SchemaVersion
from schema.version import SCHEMA_VERSION, WRITER

__all__ = ["Upgrade", "back_up", "upgrade"]


@dataclass(frozen=True)
class Upgrade:
    """What an upgrade did; `backup` is None if the database had this version already."""

    path: Path
    before: int
    backup: Path | None


def back_up(url: str, to: Path) -> Path:
    """Copy a run database to a new file with SQLite's backup API, which a live run may write to.

    Returns the database that was copied. Raises SettingsError if there is none or `to` exists,
    MachineError if SQLite or the disk fails.
    """
    path = database_path(url)
    connect_read_only(path, versions=KNOWN_VERSIONS).close()
    _copy(path, to)
    return path


def upgrade(url: str) -> Upgrade:
    """Bring a run database to this program's schema version, after a backup beside it.

    All migrations are one transaction: they happen, or nothing changes. A backup of the same
    content may be there, as a kill leaves it. Raises SettingsError for a database that is not ours
    or newer than this program, or for a backup of other content, MachineError if SQLite or the disk
    fails.
    """
    path = database_path(url)
    if not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    refuse_unwritable(path)
    refuse_strangers(path, may_write=True, versions=KNOWN_VERSIONS)
    before = schema_version(path)
    if before is None or before == SCHEMA_VERSION:
        return Upgrade(path, SCHEMA_VERSION, None)
    backup = path.with_name(f"{path.name}.version-{before}")
    try:
        with database_errors(path), writing_engine(path) as engine, engine.begin() as connection:
            # Under the write lock, so that the backup has all that is migrated.
            _copy(path, backup, replace_same=True)
            _migrate(connection, before)
    except BaseException:
        if _same_content(path, backup):  # nothing has changed, so that nobody needs it
            backup.unlink()
        raise
    return Upgrade(path, before, backup)


def _copy(path: Path, to: Path, *, replace_same: bool = False) -> None:
    """Copy a database to a new file; with `replace_same` one of the same content may be there."""
    replaceable = partial(_same_content, path) if replace_same else None
    with (
        new_path(to, folder=False, replaceable=replaceable) as temporary,
        _no_side_files(temporary),
        disk_errors(to),
        sqlite_errors(path),
        closing(connect_read_only(path, versions=KNOWN_VERSIONS)) as source,
        closing(sqlite3.connect(temporary)) as target,
    ):
        try:
            source.backup(target)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_FULL":
                raise
            raise MachineError(f"{to}: {error}") from None
        # A copy of a database in WAL mode would make itself a -wal file when it is first read.
        with sqlite_errors(to):
            target.execute("PRAGMA locking_mode = EXCLUSIVE")  # which needs no -shm file
            target.execute("PRAGMA journal_mode = DELETE")


@contextmanager
def _no_side_files(copy: Path) -> Iterator[None]:
    """Remove what SQLite may leave beside a copy at the end of the block, as on a full disk."""
    try:
        yield
    finally:
        for suffix in ("-wal", "-shm", "-journal"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


def _same_content(path: Path, copy: Path) -> bool:
    """Return whether two run databases have the same tables, rows and views."""
    try:
        with (
            closing(connect_read_only(path, versions=KNOWN_VERSIONS)) as one,
            closing(connect_read_only(copy, versions=KNOWN_VERSIONS)) as other,
        ):
            return all(a == b for a, b in zip_longest(one.iterdump(), other.iterdump()))
    except (LedgerError, sqlite3.Error):  # not a run database, or not a whole one
        return False


def _migrate(connection: Connection, before: int) -> None:
    """Run Alembic's migrations, and make the views of this version; the user's own stay."""
    for view in view_comments():  # no version had a view that this one lacks
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view}")
    with as_file(files("schema") / "migrations") as scripts:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        command.stamp(config, str(before))
        command.upgrade(config, str(SCHEMA_VERSION))
    # schema_version tells the version; Alembic's own table would be a second opinion.
    connection.exec_driver_sql("DROP TABLE alembic_version")
    make_views(connection)
    version = {"version": SCHEMA_VERSION, "created_at": utc_now(), "writer": WRITER}
    connection.execute(insert(SchemaVersion), version)
