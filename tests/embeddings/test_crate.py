"""Crates: if this fails, RO-Crate tells another story of a run than what happened.

The crate is read back by rocrate, the library of those who define the format.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rocrate.rocrate import ROCrate

from lib.embeddings import open_run
from lib.files import file_sha256
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from tests import processes
from tests.conftest import SOME_PROTEINS, Once, Place, Script
from tests.test_make import make


@pytest.fixture
def resumed(script: Script, place: Place, small_model: Path, once: Once) -> None:
    """Run 1: interrupted after two of four checkpoints, and finished by another attempt."""

    def embed_and_resume() -> None:
        place.set("output", "checkpoint_records", 4)
        place.set("compute", "tokens_per_pack", 300)
        flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
        assert script("embed", *flags).status == 0
        with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
            change = session.connection().exec_driver_sql
            change("UPDATE runs SET status = 'interrupted', finished_at = NULL")
            change("UPDATE attempts SET outcome = 'interrupted', error = 'SIGINT: interrupted'")
            change("DELETE FROM checkpoints WHERE id > 2")
        for path in place.output.glob("run-000001/checkpoint-00000[34].parquet"):
            path.unlink()
        assert script("resume").status == 0

    once(embed_and_resume)


def made(script: Script, place: Place, *flags: str) -> Path:
    to = place.folder / "crate"
    answer = script("crate", "--run", "1", "--to", to, *flags)
    assert answer.status == 0, answer.err
    assert answer.out == f"run 1: crate of 4 checkpoints in {to}\n"
    return to


def test_a_full_disk_names_the_crate_and_leaves_nothing(place: Place, resumed: None) -> None:
    before, to = place.files(), place.folder / "crate"
    limited = partial(processes.limit_files, 2000)  # less than a checkpoint file
    with place.read_by_another():
        done = processes.run(
            "crate", "--run", "1", "--to", to, "--config", place.config, prepare=limited
        )
    assert (done.status, done.error) == (4, f"{to}: File too large")
    assert place.files() == before


def test_every_attempt_is_an_action_with_what_it_made(
    script: Script, place: Place, resumed: None
) -> None:
    crate = ROCrate(made(script, place))
    first, second = crate.root_dataset["mentions"]
    assert [action.type for action in (first, second)] == ["CreateAction"] * 2
    assert first["actionStatus"] == "http://schema.org/FailedActionStatus"
    assert first["error"] == "SIGINT: interrupted"
    assert second["actionStatus"] == "http://schema.org/CompletedActionStatus"
    assert "error" not in second.properties()
    rows = query(
        str(place.database),
        "SELECT attempt_id, path FROM checkpoints ORDER BY first_position",
    ).rows
    for number, action in ((1, first), (2, second)):
        assert [file.id for file in action["result"]] == [
            path for attempt, path in rows if attempt == number
        ]
        assert datetime.fromisoformat(action["startTime"]) <= datetime.fromisoformat(
            action["endTime"]
        )
        assert action["instrument"]["name"] == "esm-ledger"
        requirements = action["instrument"]["softwareRequirements"]
        names = {one["name"] for one in requirements}
        assert names > {"python", "torch", "numpy"}
        assert "attention" not in names
    given = {one.id: one for one in first["object"]}
    run = open_run(place.database, 1)
    assert given["#input-0"]["sha256"] == file_sha256(SOME_PROTEINS)
    assert given["#weights"]["sha256"] == run.model["sha256"]
    assert given["#precision"]["value"] == "float32"
    assert given["#compile"]["value"] == "no"
    assert given["#repr_layers"]["value"] == "2"


def test_the_files_are_those_of_the_run(script: Script, place: Place, resumed: None) -> None:
    to = made(script, place)
    crate = ROCrate(to)
    files = {file.id: file for file in crate.root_dataset["hasPart"]}
    assert {path.name for path in to.iterdir()} == {*files, "ro-crate-metadata.json"}
    for name, file in files.items():
        assert file.type == "File"
        if name != "run.json":
            assert file["sha256"] == file_sha256(to / name)
            assert file["contentSize"] == str((to / name).stat().st_size)
            original = place.output / "run-000001" / name
            assert (to / name).read_bytes() == original.read_bytes()
    facts = json.loads((to / "run.json").read_text())
    assert facts["run_uuid"] == open_run(place.database, 1).facts["uuid"]
    for name in ("run.json", "ro-crate-metadata.json"):
        for private in (place.folder, SOME_PROTEINS.parent):
            assert str(private) not in (to / name).read_text()


def test_files_that_were_copied_name_their_run(
    script: Script, place: Place, small_model: Path
) -> None:
    place.set("output", "reuse", "yes")
    for _ in range(2):
        assert script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS).status == 0
    to = place.folder / "crate"
    assert script("crate", "--run", "2", "--to", to).status == 0
    (file,) = (one for one in ROCrate(to).root_dataset["hasPart"] if one.id != "run.json")
    assert file["isBasedOn"].id == f"urn:uuid:{open_run(place.database, 1).facts['uuid']}"
    assert json.loads((to / "run.json").read_text())["records_copied"] == 15


def references(value: Any) -> set[str]:  # noqa: ANN401
    if isinstance(value, dict):
        inner = set().union(*(references(one) for key, one in value.items() if key != "@id"))
        return inner | ({value["@id"]} if [*value] == ["@id"] else set())
    return set().union(*map(references, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("license", [None, "https://creativecommons.org/licenses/by/4.0/", "ours"])
def test_it_has_what_both_specifications_demand(
    script: Script, place: Place, resumed: None, license: str | None
) -> None:
    """Their MUSTs, of RO-Crate 1.1 and Process Run Crate 0.5; docs/sharing.md says what else."""
    to = made(script, place, *([] if license is None else ["--license", license]))
    content = json.loads((to / "ro-crate-metadata.json").read_text())
    entities = {one["@id"]: one for one in content["@graph"]}
    assert len(entities) == len(content["@graph"])
    assert content["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    assert descriptor["@type"] == "CreativeWork"
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert descriptor["about"] == {"@id": "./"}
    assert root["@type"] == "Dataset"
    assert root["name"] == f"ESM-2 embeddings of {SOME_PROTEINS.name} by esm2_small"
    assert "Untrained weights: the vectors mean nothing." in root["description"]
    datetime.fromisoformat(root["datePublished"])
    linked = license is not None and "://" in license
    assert root["license"] == ({"@id": license} if linked else license or "not stated")
    assert root["conformsTo"] == {"@id": "https://w3id.org/ro/wfrun/process/0.5"}
    # Nothing is referred to that is not described.
    assert references(content["@graph"]) - {*entities} == {"https://w3id.org/ro/crate/1.1"}


def test_an_altered_file_is_refused_and_leaves_nothing(
    script: Script, place: Place, resumed: None
) -> None:
    path = place.output / "run-000001" / "checkpoint-000002.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # of the same size, and its footer as it was
    path.write_bytes(content)
    before = place.files()
    answer = script("crate", "--run", "1", "--to", place.folder / "crate")
    assert answer.status == 3
    assert answer.error == f"run 1: {path}: sha256 differs from the database"
    assert place.files() == before


def test_an_existing_folder_and_an_unfinished_run_are_refused(
    script: Script, place: Place, resumed: None
) -> None:
    answer = script("crate", "--run", "1", "--to", place.output)
    assert (answer.status, answer.error) == (2, f"{place.output}: exists already")
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql("UPDATE runs SET status = 'interrupted'")
    answer = script("crate", "--run", "1", "--to", place.folder / "crate")
    assert answer.status == 2
    assert answer.error == "run 1: interrupted, 15 of 15 records done"


def test_a_missing_library_is_one_line(
    script: Script, place: Place, resumed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rocrate", None)
    answer = script("crate", "--run", "1", "--to", place.folder / "crate")
    assert (answer.status, answer.error) == (2, "format crate: rocrate is not installed")


def test_make_hands_everything_on(place: Place, resumed: None) -> None:
    to = place.folder / "it's a crate"
    done = make("crate", variables={"RUN": "1", "TO": str(to), "CONFIG": str(place.config)})
    assert done.returncode == 0, done.stderr
    assert (to / "ro-crate-metadata.json").is_file()
