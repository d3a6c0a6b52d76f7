"""The run database as a SQLite file: found, checked for being ours, opened read-only.

Plain sqlite3, so that what only reads history starts in a moment.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lib.errors import MachineError, SettingsError
from schema.version import APPLICATION_ID, SCHEMA_VERSION

__all__ = [
    "BUSY_SECONDS",
    "KNOWN_VERSIONS",
    "connect_read_only",
    "database_path",
    "error_fact",
    "leave_wal",
    "raise_ctrl_c",
    "refuse_empty",
    "refuse_strangers",
    "refuse_unwritable",
    "schema_version",
    "sqlite_errors",
]

BUSY_SECONDS = 60
KNOWN_VERSIONS = range(1, SCHEMA_VERSION + 1)  # this one, and those that `make upgrade` takes
_STEPS = 100_000  # of SQLite's machine, some milliseconds
_DRIVERS = ("sqlite", "sqlite+pysqlite")  # two names of Python's own
_WAL_MODE = b"\2"  # in byte 18 of the file (sqlite.org/fileformat2.html, 1.3)


def database_path(url: str) -> Path:
    """Return the SQLite file that a path or SQLAlchemy URL names; refuse other databases."""
    if "://" not in url:
        return Path(url)
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: its port is not a number
        raise SettingsError(f"database {url}: not a SQLAlchemy URL") from None
    if parsed.drivername not in _DRIVERS:
        raise SettingsError(f"database {url}: {parsed.drivername}, not sqlite")
    if parsed.host:
        raise SettingsError(f"database {url}: host {parsed.host}, but SQLite has none")
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise SettingsError(f"database {url}: names no file")
    return Path(parsed.database).absolute()


def connect_read_only(
    path: Path, versions: Container[int] = (SCHEMA_VERSION,)
) -> sqlite3.Connection:
    """Open a run database of one of these schema versions for reading.

    Raises SettingsError if there is none or it is not ours.
    """
    if not path.is_file():
        raise SettingsError(f"database {path}: no such file")
    refuse_strangers(path, versions=versions)
    with sqlite_errors(path):
        connection = _connect(path)
        connection.execute("PRAGMA query_only = ON")
        # A read-only connection could still create a file by ATTACH or VACUUM INTO.
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        # Ctrl-C raises KeyboardInterrupt where Python runs: within a query, here.
        connection.set_progress_handler(_go_on, _STEPS)
    return connection


def refuse_strangers(
    path: Path, *, may_write: bool = False, versions: Container[int] = (SCHEMA_VERSION,)
) -> None:
    """Refuse a database that is not ours, or of another version, before anything is written.

    If `may_write`, roll back a change left by a killed process, as in the first moments of a
    database. A missing or empty file belongs to nobody and is not refused. Raises SettingsError
    with what was found and what is expected, MachineError for a file that SQLite cannot read.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    found = schema_version(path, may_write=may_write)
    if found is None or found in versions:
        return
    older = " (make upgrade)" if found in KNOWN_VERSIONS else ""
    raise SettingsError(
        f"database {path}: schema version {found}, this program's is {SCHEMA_VERSION}{older}"
    )


def refuse_unwritable(path: Path) -> None:
    """Raise MachineError for a database, or what SQLite keeps beside it, that may only be read.

    SQLite opens it all the same, and fails at the first change.
    """
    for suffix in ("", "-wal", "-shm"):
        file = Path(f"{path}{suffix}")
        if file.exists() and not os.access(file, os.W_OK):
            raise MachineError(f"database {path}: {file.name} is not writable")


def refuse_empty(path: Path) -> None:
    """Raise SettingsError for a database without tables: its first start was cut short."""
    if schema_version(path) is None:
        raise SettingsError(f"database {path}: no runs in it yet")


def schema_version(path: Path, *, may_write: bool = False) -> int | None:
    """Return the schema version of a run database; None if the file is empty of tables.

    may_write: as in `refuse_strangers`, which also tells what is raised.
    """
    with sqlite_errors(path):
        try:
            return _schema_version(path)
        except sqlite3.OperationalError as error:
            if not may_write or not _mended(path, error):
                raise
            return _schema_version(path)


def _mended(path: Path, error: sqlite3.OperationalError) -> bool:
    """Make a database readable that only a writer can open; return False if that is not the fault.

    A change left by a killed process is rolled back. A database in WAL mode that lies where no
    memory can be shared is turned to a rollback journal, if its header says that it is ours.
    """
    # SQLite reports the same while another first start ends its change.
    if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as found:
            found.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        return True
    if error.sqlite_errorname == "SQLITE_IOERR_SHMMAP" and _header_application_id(path) == (
        APPLICATION_ID
    ):
        leave_wal(path)
        return True
    return False


def leave_wal(path: Path) -> str:
    """Turn a database to a rollback journal where no memory can be shared; return its mode."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # WAL needs no shared memory then
        (mode,) = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        return str(mode)


def _header_application_id(path: Path) -> int:
    """Return what a SQLite file says of its owner (sqlite.org/fileformat2.html, 1.3)."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(72)[68:], "big")


def _schema_version(path: Path) -> int | None:
    with closing(_connect(path)) as connection:
        # One state for all that is read: another first start may make the database meanwhile.
        connection.execute("BEGIN")
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema")]
        if found == 0 and not names:
            return None
        if found != APPLICATION_ID:
            raise SettingsError(
                f"database {path}: application_id {found:#x} is another program's, "
                f"esm-ledger's is {APPLICATION_ID:#x}"
            )
        version = None
        if "schema_version" in names:
            (version,) = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        if not isinstance(version, int):
            raise SettingsError(
                f"database {path}: schema version {version}, this program's is {SCHEMA_VERSION}"
            )
        return version


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite reports into a MachineError of one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise_ctrl_c(error)
        raise MachineError(f"database {path}: {error_fact(error)}") from None
    except UnicodeDecodeError:  # SQLite quotes what it cannot read
        raise MachineError(f"database {path}: malformed, its text is not UTF-8") from None


def raise_ctrl_c(error: BaseException | None) -> None:
    """Raise KeyboardInterrupt if an error of SQLite is that a read-only query was interrupted."""
    if getattr(error, "sqlite_errorname", "") == "SQLITE_INTERRUPT":
        raise KeyboardInterrupt


def error_fact(error: BaseException | None) -> str:
    """Return what SQLite reports, of what the disk refused with which step that was."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_IOERR_SHMMAP":  # a network file system, as a rule
        return f"WAL does not work there: {error} ({name})"
    if name == "SQLITE_READONLY_ROLLBACK":
        return f"an interrupted change has not been rolled back ({name})"
    return f"{error} ({name})" if name.startswith("SQLITE_IOERR") else str(error)


def _connect(path: Path) -> sqlite3.Connection:
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    mode = "mode=ro&immutable=1" if _is_at_rest(path) else "mode=ro"
    connection = sqlite3.connect(f"file://{quoted}?{mode}", uri=True, timeout=BUSY_SECONDS)
    connection.isolation_level = None
    return connection


def _is_at_rest(path: Path) -> bool:
    """Return whether a database in WAL mode may only be read by this process, and nobody writes it.

    SQLite reads it if it is told so. Else it would have to make a -wal and a -shm file, for which
    the folder may not be writable; where it is, they would be this user's, and lock out the owner.
    A process that has the database open has made a -wal file, whose content would be left out.
    """
    path = path.resolve()
    try:
        if os.access(path, os.W_OK):
            return False
        log = Path(f"{path}-wal")
        if log.exists() and (log.stat().st_size > 0 or Path(f"{path}-shm").exists()):
            return False
        with path.open("rb") as file:
            return file.read(19)[18:] == _WAL_MODE
    except OSError:  # told by SQLite
        return False


def _go_on() -> int:
    return 0
