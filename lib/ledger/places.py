"""Places: where the folder of a run, its input and its weights lie now, by what the database says.

What lies below the folder of the run database is stored as `./embeddings/run-000001`, from that
folder on, so that it moves along with the database. Anything else is stored absolute, and so is all
that older versions stored: that is first looked for where it would be if it had moved along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lib.errors import IdentityRefusedError, MachineError, SettingsError
from lib.ledger.ownership import LOCK_NAME, uuid_in_lock
from lib.ledger.sqlite_file import database_path

__all__ = [
    "StoredRun",
    "given_folder",
    "real_path",
    "real_settings",
    "shown_path",
    "stored_path",
]

_BELOW = "./"


@dataclass(frozen=True)
class StoredRun:
    """What the row of a run says of places.

    settings: those it was started with; they tell where its database lay then.
    """

    id: int
    uuid: str
    output_folder: str
    settings: object

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> StoredRun:
        """Return what a row of `runs` says, as SQLite gives it; settings: as JSON, or NULL."""
        try:
            settings = json.loads(row["settings"] or "null")
        except ValueError:  # altered: nothing is known of the time before
            settings = None
        return cls(row["id"], row["uuid"], row["output_folder"], settings)

    def folder(self, database: Path) -> Path:
        """Return the folder of the run; its files need not be there."""
        if self.output_folder.startswith(_BELOW):
            return _below(self.output_folder, database)
        moved = _moved_along(self.output_folder, self.settings, database)
        if moved is not None and _is_folder_of(moved, self.uuid):
            return moved
        return Path(self.output_folder)

    def path(self, stored: str, database: Path, folder: Path) -> Path:
        """Return where a file that the run read lies; folder: where the folder of the run does.

        The copy of standard input is kept in the folder of the run, wherever that is.
        """
        if PurePath(stored).parent == PurePath(self.output_folder):
            return folder / PurePath(stored).name
        return real_path(stored, self.settings, database)


def stored_path(path: Path, database: Path) -> str:
    """Return a path as the database keeps it: from its folder on, if it is below, else absolute."""
    base = _base(database)
    for ancestor in path.parents:
        below = path.relative_to(ancestor)
        if ".." in below.parts:
            break
        try:
            if ancestor.samefile(base):
                return f"{_BELOW}{below}"
        except OSError:  # not there
            continue
    return str(path)


def real_path(stored: str, settings: object, database: Path) -> Path:
    """Return where a file lies now that the database names; settings: of the run that names it."""
    if stored.startswith(_BELOW):
        return _below(stored, database)
    moved = _moved_along(stored, settings, database)
    if moved is not None and moved.exists():
        return moved
    return Path(stored)


def real_settings(settings: Mapping[str, Any], database: Path) -> dict[str, Any]:
    """Return the settings of a run, with the folders of its weights where these lie now."""
    found = dict(settings)
    model = found.get("model")
    if isinstance(model, Mapping):
        places = {name: model.get(name) for name in ("base_model", "weights_directory")}
        found["model"] = {**model} | {
            name: str(real_path(place, settings, database))
            for name, place in places.items()
            if isinstance(place, str)
        }
    return found


def shown_path(stored: str, database: Path) -> str:
    """Return a text that begins with a stored path as people read it: absolute."""
    return str(_below(stored, database)) if stored.startswith(_BELOW) else stored


def given_folder(run: StoredRun, output: Path) -> Path:
    """Return the folder of a run that lies at `output`, or within it under its old name.

    Raises SettingsError if there is no such folder, IdentityRefusedError unless a file in it names
    the run in its footer. One that has nothing but a lock may be of a run that committed nothing,
    if the lock does not say that it is another's.
    """
    name = PurePath(run.output_folder).name
    folder = output
    if (output / name).is_dir() and next(_checkpoints(output), None) is None:
        folder = output / name
    if not folder.is_dir():
        raise SettingsError(f"output folder {folder}: no such folder")
    found = _uuids(folder)
    other = next(found, None)
    if other is None:
        is_empty = all(path.name.startswith(".") for path in _entries(folder))
        if not (is_empty and (folder / LOCK_NAME).exists()):
            raise IdentityRefusedError(f"run {run.id}: {folder} has no checkpoint file of it")
        claimed = uuid_in_lock(folder)
        if claimed not in (run.uuid, None):
            raise IdentityRefusedError(
                f"run {run.id}: uuid is {run.uuid} in the database, {claimed} in the lock of "
                f"{folder}"
            )
    elif other != run.uuid and run.uuid not in found:
        raise IdentityRefusedError(
            f"run {run.id}: uuid is {run.uuid} in the database, {other} in the footers of {folder}"
        )
    return folder


def _base(database: Path) -> Path:
    """Return the folder of the database itself, not of a link to it."""
    return (database.resolve() if database.is_symlink() else database.absolute()).parent


def _below(stored: str, database: Path) -> Path:
    return _base(database) / stored.removeprefix(_BELOW)


def _moved_along(stored: str, settings: object, database: Path) -> Path | None:
    """Return where an absolute path leads if it moved along with the database; None if neither."""
    section = settings.get("database") if isinstance(settings, Mapping) else None
    url = section.get("url") if isinstance(section, Mapping) else None
    if not isinstance(url, str):
        return None
    try:
        before, path = database_path(url).parent, PurePath(stored)
    except SettingsError:
        return None
    base = _base(database)
    if before == base or not path.is_relative_to(before):
        return None
    return base / path.relative_to(before)


def _is_folder_of(folder: Path, uuid: str) -> bool:
    """Return whether a folder has a file of a run, or at least none of another."""
    found = _uuids(folder)
    return folder.is_dir() and (next(found, uuid) == uuid or uuid in found)


def _uuids(folder: Path) -> Iterator[object]:
    """Yield the uuid in the footer of each checkpoint file of a folder that can be read."""
    # Imported here, because what only reads history starts without Arrow.
    from lib.ledger.footer import read_footer

    for path in _checkpoints(folder):
        try:
            identity = read_footer(path).get("identity")
        except ValueError:
            continue
        if isinstance(identity, dict):
            yield identity.get("uuid")


def _checkpoints(folder: Path) -> Iterator[Path]:
    found = (path for path in _entries(folder) if path.name.startswith("checkpoint-"))
    return (path for path in found if path.suffix == ".parquet")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}") from None
