"""Moves: if these fail, results that were moved or copied are lost to the record, or mixed up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lib.embeddings import open_run
from lib.errors import MachineError
from lib.ledger.ownership import take_lock
from lib.ledger.places import stored_path
from tests import processes
from tests.conftest import DATA, SOME_PROTEINS, WHOLE_PROTEINS
from tests.ledger.conftest import QUICK, Call, ask, contents, folder
from tests.reference import assert_same_bits
from tests.test_make import make

# The project is embedded once.
pytestmark = pytest.mark.xdist_group("moves")


def let_be_absolute(project: Path, was_at: Path) -> None:
    """Make rows what older versions wrote: absolute paths of the place where the project was."""
    for table, column in [
        ("runs", "output_folder"), ("runs", "input_path"), ("inputs", "path"),
        ("attempts", "weights_path"),
    ]:  # fmt: skip
        statement = f"UPDATE {table} SET {column} = ? || substr({column}, 2)"
        ask(project, f"{statement} WHERE {column} GLOB './*'", str(was_at))


# ---- The whole project


@pytest.mark.parametrize("absolute", [False, True], ids=["of today", "of an older version"])
def test_a_copied_project_works_and_leaves_the_first_alone(
    call: Call, made: Path, project: Path, absolute: bool
) -> None:
    if absolute:
        let_be_absolute(project, made)
    before = contents(made)
    assert call("validate", "--run", "1").status == 0
    assert call("report", "--run", "1").status == 0
    assert call("verify", "--run", "1", "--sample", "1").status == 0
    to = project / "out.csv"
    assert call("export", "--run", "1", "--format", "csv", "--to", to).status == 0
    assert call("history", "--run", "1", "--json").json["output"] == str(folder(project))
    answer = call("resume", "--json")
    assert answer.status == 0, answer.err
    assert answer.json["output_folder"] == str(folder(project, 2))
    assert_same_bits(folder(project, 2), folder(project, 1))
    assert call("prune", "--run", "1").status == 0
    assert not folder(project).exists()
    assert contents(made) == before


def test_a_copied_database_prunes_nothing_of_the_first(
    call: Call, made: Path, project: Path
) -> None:
    """Where runs lie outside of the project, both have the very folder."""
    outside = project.parent / "outside"
    flags = ["--esm-model", project / "models" / "small.pt", "--input", project / "proteins.fasta"]
    assert call("embed", *flags, *QUICK, "--output", outside).status == 0
    copied = project.parent / "copied.sqlite"
    shutil.copy(project / "runs.sqlite", copied)
    before = contents(outside)
    for dry in ([], ["--dry-run"]):
        answer = call("prune", "--run", "3", "--database", copied, *dry)
        fact = f"is that of database {project / 'runs.sqlite'}"
        assert (answer.status, answer.error) == (
            2, f"run 3: output folder {outside / 'run-000003'} {fact}"
        )  # fmt: skip
    assert contents(outside) == before
    assert call("prune", "--run", "3").status == 0
    assert not (outside / "run-000003").exists()


@pytest.mark.parametrize("absolute", [False, True], ids=["of today", "of an older version"])
def test_a_moved_project_finds_weights_input_and_files(
    call: Call, project: Path, absolute: bool
) -> None:
    before = project
    if absolute:
        ask(project, "UPDATE runs SET settings = json_set(settings, '$.database.url', ?)",
            f"{project}/runs.sqlite")  # fmt: skip
        let_be_absolute(project, project)
    project = project.rename(project.with_name("moved"))
    opened = open_run(project / "runs.sqlite", 1)
    assert set(opened.input_files) == {str(project / "proteins.fasta")}
    assert opened.facts["output_folder"] == str(folder(project))
    answer = call("resume", at=project)
    assert answer.status == 0, answer.err
    assert_same_bits(folder(project, 2), folder(project, 1))
    assert call("validate", "--run", "2", at=project).status == 0
    assert not before.exists()


def test_paths_below_the_database_are_stored_from_there_on(call: Call, project: Path) -> None:
    assert ask(project, "SELECT output_folder, input_path FROM runs WHERE id = 1") == [
        ("./embeddings/run-000001", "./proteins.fasta")
    ]
    assert ask(project, "SELECT DISTINCT path FROM inputs") == [("./proteins.fasta",)]
    assert ask(project, "SELECT DISTINCT weights_path FROM attempts") == [("./models/small.pt",)]
    question = "SELECT run FROM checkpoint_audit WHERE file LIKE '%/run-000001/checkpoint-000001%'"
    assert ask(project, question) == [(1,)]
    assert ask(project, "SELECT input FROM run_history WHERE input LIKE '%/proteins.fasta'")
    shown = call("history", "--run", "1").out
    assert f"input                {project}/proteins.fasta\n" in shown


def test_standard_input_that_was_kept_moves_along(
    call: Call, project: Path, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", "-", *QUICK]
    flags += ["--config", project / "config.ini"]
    assert processes.run("embed", *flags, into=SOME_PROTEINS).status == 0
    project = project.rename(project.with_name("moved"))
    assert call("validate", "--run", "3", at=project).status == 0
    (kept,) = set(open_run(project / "runs.sqlite", 3).input_files)
    assert Path(kept).parent == folder(project, 3)


def test_a_run_of_version_1_that_was_moved_goes_on(call: Call, tmp_path: Path, made: Path) -> None:
    project = shutil.copytree(DATA / "version_1", tmp_path / "old")
    shutil.copy(WHOLE_PROTEINS, project)
    shutil.copy(made / "config.ini", project)
    assert call("upgrade", at=project).status == 0
    assert call("validate", "--run", "1", at=project).status == 0
    answer = call("resume", "--run", "2", at=project)
    assert answer.status == 0, answer.err
    assert call("validate", "--run", "2", at=project).status == 0


def test_where_an_older_run_would_be_another_is_not_taken_for_it(
    call: Call, made: Path, project: Path
) -> None:
    let_be_absolute(project, made)
    shutil.rmtree(folder(project, 1))
    shutil.copytree(folder(project, 2), folder(project, 1))
    detail = call("history", "--run", "1", "--json").json
    assert detail["output"] == str(folder(made))


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("data/embeddings/run-000001", "./embeddings/run-000001"),
        ("data/a.fasta", "./a.fasta"),
        ("link/a.fasta", "./a.fasta"),
        ("data/none/../a.fasta", None),
        ("other/../data/a.fasta", "./a.fasta"),
        ("data/../a.fasta", None),
        ("database/a.fasta", None),
    ],
)
def test_what_is_below_the_database(tmp_path: Path, path: str, stored: str | None) -> None:
    for name in ("data", "database", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("data")
    found = stored_path(tmp_path / path, tmp_path / "data" / "runs.sqlite")
    assert found == (stored or str(tmp_path / path))


def test_the_folder_of_a_database_is_not_that_of_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "runs.sqlite").touch()
    (tmp_path / "runs.sqlite").symlink_to("data/runs.sqlite")
    assert stored_path(tmp_path / "data" / "a", tmp_path / "runs.sqlite") == "./a"
    assert stored_path(tmp_path / "a", tmp_path / "runs.sqlite") == str(tmp_path / "a")


# ---- The folder of a run alone


@pytest.fixture
def elsewhere(project: Path) -> Path:
    """Where the folders of all runs lie now; the database does not know."""
    return (project / "embeddings").rename(project.parent / "elsewhere")


def test_every_command_takes_where_the_folder_lies_now(
    call: Call, project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = project / "out"
    for name, *flags in [
        ("validate", "--run", "1"),
        ("verify", "--run", "1", "--sample", "1"),
        ("report", "--run", "1"),
        ("crate", "--run", "1", "--to", to / "crate"),
        ("export", "--run", "1", "--format", "csv", "--to", to / "out.csv"),
        ("neighbours", "--run", "1", "--query", "1", "--to", to / "nearest.csv"),
        (
            "neighbours",
            "--run",
            "1",
            "--query",
            project / "proteins.fasta",
            "--to",
            to / "found.csv",
        ),
    ]:
        to.mkdir(exist_ok=True)
        assert call(name, *flags).status in (3, 4), name
        answer = call(name, *flags, "--output", elsewhere)
        assert answer.status == 0, (name, answer)
    page = (project / "reports" / "run-000001.html").read_text()
    assert str(folder(elsewhere.parent)).replace("embeddings", "elsewhere") in page
    assert str(project / "models" / "small.pt") in page
    monkeypatch.chdir(elsewhere)
    opened = open_run(project / "runs.sqlite", 1, output="run-000001")
    monkeypatch.chdir(project)
    assert len(opened.matrix()) == 12
    answer = call("resume", "--output", elsewhere)
    assert answer.status == 0, answer.err
    assert_same_bits(elsewhere / "run-000002", elsewhere / "run-000001")


def test_another_run_s_folder_is_refused_with_both_uuids(
    call: Call, project: Path, elsewhere: Path
) -> None:
    ((one,), (two,)) = ask(project, "SELECT uuid FROM runs ORDER BY id")
    before = contents(elsewhere)
    for name in ("validate", "resume", "verify", "report"):
        answer = call(name, "--run", "1", "--output", elsewhere / "run-000002")
        assert (answer.status, answer.err.count("\n")) == (3, 1)
        assert answer.error == (
            f"run 1: uuid is {one} in the database, {two} in the footers of "
            f"{elsewhere / 'run-000002'}"
        )
    assert contents(elsewhere) == before


@pytest.mark.parametrize(
    ("made_there", "status", "fact"),
    [
        (None, 2, "output folder {}: no such folder"),
        ([], 3, "run 1: {} has no checkpoint file of it"),
        (["notes.txt", ".lock"], 3, "run 1: {} has no checkpoint file of it"),
    ],
)
def test_a_folder_that_is_no_run_s_is_refused(
    call: Call, project: Path, made_there: list[str] | None, status: int, fact: str
) -> None:
    there = project / "there"
    for name in made_there or []:
        there.mkdir(exist_ok=True)
        (there / name).touch()
    if made_there == []:
        there.mkdir()
    answer = call("validate", "--run", "1", "--output", there)
    assert (answer.status, answer.error) == (status, fact.format(there))


def test_a_run_that_committed_nothing_goes_on_where_it_lies_now(
    call: Call, project: Path, elsewhere: Path
) -> None:
    ask(project, "DELETE FROM checkpoints WHERE run_id = 2")
    for path in (elsewhere / "run-000002").glob("*.parquet"):
        path.unlink()
    ((one,), (two,)) = ask(project, "SELECT uuid FROM runs ORDER BY id")
    others = elsewhere / "run-000002"  # also without a checkpoint
    answer = call("resume", "--run", "1", "--output", others)
    fact = f"run 1: uuid is {one} in the database, {two} in the lock of {others}"
    assert (answer.status, answer.error) == (3, fact)
    assert call("resume", "--output", elsewhere).status == 0
    assert_same_bits(elsewhere / "run-000002", elsewhere / "run-000001")


def test_where_a_run_goes_on_is_on_record_while_it_does(
    call: Call, project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(elsewhere, project / "copy")
    (project / "embeddings").mkdir()
    before = contents(elsewhere)
    seen: list[str] = []

    def meanwhile(*_: object) -> Iterator[str]:
        """Try what another process might, now that the attempt has begun."""
        for name, *flags in [
            ("prune",), ("prune", "--dry-run"), ("prune", "--output", copy),
            ("resume", "--output", copy), ("relocate", "--output", copy),
        ]:  # fmt: skip
            seen.append(call(name, "--run", "2", *flags).error)
        return iter(())

    monkeypatch.setattr("scripts.resume.adopt_leftovers", meanwhile)
    assert call("resume", "--run", "2", "--output", elsewhere).status == 0
    assert len(seen) == 5
    assert all(error.startswith("run 2: owned by process ") for error in seen), seen
    assert ask(project, "SELECT output_folder FROM runs WHERE id = 2") == [
        (str(elsewhere / "run-000002"),)
    ]
    assert call("validate", "--run", "2").status == 0
    assert {name: held for name, held in contents(elsewhere).items() if name in before} == before


@pytest.mark.parametrize(
    "command", [("resume",), ("prune",), ("prune", "--dry-run")], ids=lambda one: " ".join(one)
)
def test_a_copy_of_the_folder_of_a_live_run_is_refused(
    call: Call, project: Path, command: tuple[str, ...]
) -> None:
    copy = shutil.copytree(project / "embeddings", project / "copy")
    with take_lock(folder(project, 2)):
        before = contents(project)
        name, *flags = command
        answer = call(name, "--run", "2", *flags, "--output", copy)
    assert (answer.status, answer.error[:24]) == (4, "run 2: owned by process ")
    assert contents(project) == before


@pytest.mark.parametrize(
    ("meanwhile", "status", "fact"),
    [
        (["relocate", "--output", "copy"], 4, "run 2: owned by process "),
        (["prune"], 2, "run 2: its files were pruned at "),
    ],
    ids=["continued in another folder", "pruned"],
)
def test_a_run_that_was_taken_before_the_attempt_began_is_refused(
    call: Call, project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch,
    meanwhile: list[str], status: int, fact: str,
) -> None:  # fmt: skip
    shutil.copytree(elsewhere, project / "copy")
    (project / "embeddings").mkdir()
    monkeypatch.chdir(project)
    with ExitStack() as held:

        def taken(*_: object) -> Iterator[str]:
            name, *flags = meanwhile
            assert call(name, "--run", "2", *flags).status == 0
            held.enter_context(take_lock(project / "copy" / "run-000002"))
            return iter(())

        monkeypatch.setattr("scripts.resume.drop_files", taken)
        answer = call("resume", "--run", "2", "--output", elsewhere)
    assert (answer.status, answer.error[: len(fact)]) == (status, fact)
    assert ask(project, "SELECT count(*) FROM attempts WHERE run_id = 2") == [(1,)]


def test_a_run_is_pruned_where_it_lies_now(
    call: Call, project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "embeddings").mkdir()
    shutil.copytree(elsewhere / "run-000001", folder(project))
    before = contents(project)
    flags = ["--run", "1", "--output", str(elsewhere)]
    for dry in ([], ["--dry-run"]):
        answer = call("prune", *flags, *dry)
        assert (answer.status, answer.error) == (
            2,
            f"run 1: output folder {elsewhere / 'run-000001'}: not the one on record, which is "
            f"there: {folder(project)}",
        )
    assert contents(project) == before
    shutil.rmtree(folder(project))
    with monkeypatch.context() as patch:
        patch.setattr("lib.ledger.pruning._remove", refuse)
        assert call("prune", *flags).error == (
            "run 1: recorded as pruned, files are left (make prune RUN=1): not today"
        )
    answer = call("prune", "--run", "1")  # where that lay is on record
    assert answer.out.startswith("run 1: pruned, "), answer
    assert answer.out.endswith(f" removed from {elsewhere / 'run-000001'}\n")
    assert not (elsewhere / "run-000001").exists()
    assert (elsewhere / "run-000002").exists()


def refuse(_: Path) -> None:
    raise MachineError("not today")


# ---- The folder of a run is lost


def test_a_deleted_folder_is_computed_again_if_that_is_said(call: Call, project: Path) -> None:
    folder(project).rename(project / "as it was")
    answer = call("resume", "--run", "1")
    assert answer.status == 4
    assert answer.error == f"run 1: output folder {folder(project)}: no such folder"
    assert not folder(project).exists()
    answer = call("resume", "--run", "1", "--recompute-damaged")
    assert answer.status == 0, answer.err
    assert_same_bits(folder(project), project / "as it was")
    assert call("validate", "--run", "1").status == 0


def test_a_deleted_folder_with_a_plan_of_reuse_is_refused(call: Call, project: Path) -> None:
    flags = ["--esm-model", project / "models" / "small.pt", "--input", project / "proteins.fasta"]
    assert "reused: 12 of 12" in call("embed", *flags, *QUICK).err
    shutil.rmtree(folder(project, 3))
    answer = call("resume", "--run", "3", "--recompute-damaged")
    assert answer.status == 3
    assert answer.error.startswith("run 3: reuse plan .reuse-")
    assert answer.error.endswith(": no such regular file")


# ---- Written down


def test_a_folder_that_moved_is_written_down(call: Call, project: Path, elsewhere: Path) -> None:
    answer = call("relocate", "--run", "1", "--output", elsewhere)
    assert answer.status == 0, answer.err
    there = elsewhere / "run-000001"
    count = len([*there.glob("*.parquet")])
    assert answer.out == f"run 1: {count} checkpoints in {there}, before in {folder(project)}\n"
    assert ask(project, "SELECT output_folder FROM runs WHERE id = 1") == [(str(there),)]
    assert call("validate", "--run", "1").status == 0
    # Back below the database, it moves along again.
    (project / "kept").mkdir()
    back = there.rename(project / "kept" / "one")
    assert call("relocate", "--run", "1", "--output", back).status == 0
    assert ask(project, "SELECT output_folder FROM runs WHERE id = 1") == [("./kept/one",)]
    assert call("validate", "--run", "1").status == 0


def test_what_is_not_all_there_is_not_written_down(
    call: Call, project: Path, elsewhere: Path
) -> None:
    there = elsewhere / "run-000001"
    (there / "checkpoint-000002.parquet").unlink()
    whole = (there / "checkpoint-000003.parquet").read_bytes()
    (there / "checkpoint-000003.parquet").write_bytes(whole[:-1])
    answer = call("relocate", "--run", "1", "--output", there)
    assert answer.status == 3
    assert answer.error == "run 1: checkpoint-000002.parquet: no such file (and 1 more)"
    answer = call("relocate", "--run", "1", "--output", elsewhere / "run-000002")
    assert (answer.status, answer.error[:12]) == (3, "run 1: uuid ")
    assert call("relocate", "--run", "7", "--output", there).status == 2
    assert ask(project, "SELECT output_folder FROM runs WHERE id = 1") == [
        ("./embeddings/run-000001",)
    ]


def test_a_run_with_a_live_owner_is_not_relocated(
    call: Call, project: Path, elsewhere: Path
) -> None:
    with take_lock(elsewhere / "run-000002"):
        answer = call("relocate", "--run", "2", "--output", elsewhere)
    assert answer.status == 4
    assert answer.error.startswith("run 2: owned by process ")
    assert call("relocate", "--run", "2", "--output", elsewhere).status == 0
    assert call("resume").status == 0
    assert_same_bits(elsewhere / "run-000002", elsewhere / "run-000001")


def test_standard_input_that_was_kept_is_written_down_with_its_folder(
    call: Call, project: Path
) -> None:
    kept = folder(project) / ".stdin-12345678.fasta"
    shutil.copy(project / "proteins.fasta", kept)
    for table, column in [("runs", "input_path"), ("inputs", "path")]:
        ask(project, f"UPDATE {table} SET {column} = './embeddings/run-000001/{kept.name}'")
    moved = folder(project).rename(project / "one")
    assert call("validate", "--run", "1", "--output", moved).status == 0
    assert call("validate", "--run", "2").status != 0  # whose input it is, too
    assert call("relocate", "--run", "1", "--output", moved).status == 0
    assert call("validate", "--run", "2").status == 0
    assert ask(project, "SELECT DISTINCT path FROM inputs") == [(f"./one/{kept.name}",)]


def test_make_relocate(project: Path, elsewhere: Path, quick_python: Path) -> None:
    flags = ["RUN=1", f"OUTPUT={elsewhere}", f"CONFIG={project / 'config.ini'}"]
    answer = make("relocate", *flags, f"python={quick_python}")
    assert answer.stdout.startswith("run 1: "), answer.stderr
    answer = make(
        "export", "FORMAT=csv", f"TO={project / 'a.csv'}", *flags, f"python={quick_python}"
    )
    assert answer.returncode == 0, answer.stderr
