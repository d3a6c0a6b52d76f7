"""Claims: if these fail, two runs share a folder, and one of them can never be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from lib.errors import MachineError
from lib.ledger import claims
from lib.ledger.claims import claim_folder
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.ownership import LOCK_NAME
from lib.ledger.reuse_plan import plan_name
from lib.ledger.standard_input import kept_name
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.reference import read_run


def claim(database: Path, output: Path, uuid: str | None = None) -> int:
    """Claim a folder and die: the number is given back, and the run is never on record."""
    with open_for_writing(str(database)) as engine, transaction(engine) as session:
        number, _folder, lock = claim_folder(session, database, output, uuid or str(uuid4()))
        lock.close()
        return number


def a_new_one(place: Place) -> tuple[Path, Path]:
    return place.database, place.folder / "other.sqlite"


def a_copy_of_before(place: Place) -> tuple[Path, Path]:
    return place.database, place.folder / "before.sqlite"


def a_new_one_where_it_was(place: Place) -> tuple[Path, Path]:
    moved = place.database.rename(place.folder / "moved.sqlite")
    return moved, place.database


def a_new_one_after_an_earlier_version(place: Place) -> tuple[Path, Path]:
    (place.output / "run-000001" / LOCK_NAME).write_bytes(b"")
    return a_new_one(place)


@pytest.mark.parametrize(
    "other",
    [a_new_one, a_copy_of_before, a_new_one_where_it_was, a_new_one_after_an_earlier_version],
)
def test_a_run_without_a_checkpoint_keeps_its_folder_whatever_other_database_is_used_there(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: Callable[[Place], tuple[Path, Path]],
) -> None:
    def fail(*_: object) -> None:
        raise MachineError("died before the first checkpoint")

    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--json"]
    with open_for_writing(str(place.database)):
        pass
    shutil.copy(place.database, place.folder / "before.sqlite")
    with monkeypatch.context() as dying:
        dying.setattr("lib.ledger.commit.add_checkpoint", fail)
        assert script("embed", *flags).status == 4
    its, others = other(place)
    assert script("embed", *flags, "--database", others).json["run"] == 2
    assert script("resume", "--run", "1", "--database", its).status == 0
    assert len(read_run(place.output / "run-000001")) == 15


def test_the_folder_of_a_start_that_died_is_taken_with_what_it_left(place: Place) -> None:
    folder = place.output / "run-000001"
    for uuid in (str(uuid4()), str(uuid4())):
        assert claim(place.database, place.output, uuid) == 1
        (folder / kept_name(uuid)).touch()
        (folder / plan_name(uuid)).touch()
    assert claim(place.database, place.output) == 1
    assert claim(place.folder / "other.sqlite", place.output) == 2


@pytest.mark.parametrize(
    "name", [kept_name("another"), plan_name("175b5f0f-c711-4945-aad8-38338ec71d24"), "notes.txt"]
)
def test_a_folder_with_anything_else_is_not_taken(place: Place, name: str) -> None:
    assert claim(place.database, place.output) == 1
    (place.output / "run-000001" / name).touch()
    assert claim(place.database, place.output) == 2


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_lock_that_is_not_whole_is_of_nobody(place: Place, cut: int) -> None:
    assert claim(place.database, place.output) == 1
    lock = place.output / "run-000001" / LOCK_NAME
    lock.write_bytes(lock.read_bytes()[:cut])
    assert claim(place.database, place.output) == 2


def test_a_lock_that_had_no_name_yet_holds_up_nobody(place: Place) -> None:
    folder = place.output / "run-000001"
    folder.mkdir(parents=True)
    (folder / f"{LOCK_NAME}.0123456789abcdef").touch()  # of a start that died
    assert claim(place.database, place.output) == 1
    assert [path.name for path in folder.iterdir()] == [LOCK_NAME]


@pytest.mark.parametrize("target", ["rename_new", "_add"])
def test_two_starts_at_once_from_two_databases_get_two_folders(
    place: Place, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The second claims the folder while the first is about to name its lock, or to write it."""
    true, numbers = getattr(claims, target), list[int]()

    def overtaken(*arguments: object) -> object:
        monkeypatch.undo()
        numbers.append(claim(place.folder / "other.sqlite", place.output))
        return true(*arguments)

    monkeypatch.setattr(claims, target, overtaken)
    numbers.append(claim(place.database, place.output))
    assert numbers == [1, 2]
    for number in numbers:
        assert [path.name for path in (place.output / f"run-{number:06d}").iterdir()] == [LOCK_NAME]
