"""Pruning: if this fails, files that nobody named are deleted, or a pruned run looks whole."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from lib.embeddings import open_run
from lib.errors import SettingsError
from lib.ledger.questions import questions
from tests import processes
from tests.conftest import DATA, UNIPROT_PART, Place, Script
from tests.ledger.test_read_only import powerless
from tests.processes import Answer
from tests.reference import fasta, write_fasta
from tests.test_make import make

REAL = fasta(UNIPROT_PART)[:12]
QUICK = ["--set", "output.checkpoint_records=5", "--set", "compute.tokens_per_pack=250"]
PRUNED_AT = r"its files were pruned at \d{4}-\d\d-\d\dT"


@pytest.fixture
def embed(script: Script, place: Place, small_model: Path) -> Callable[..., Answer]:
    """Embed real proteins as a run that may copy from earlier ones."""

    def call(entries: list[tuple[str, str]] = REAL, *flags: str) -> Answer:
        path = write_fasta(place.folder / f"input-{len(entries)}.fasta", entries)
        answer = script("embed", "--esm-model", small_model, "--input", path, *QUICK, *flags)
        assert answer.status == 0, answer.err
        return answer

    place.set("output", "reuse", "yes")
    return call


def folder(place: Place, run: int = 1) -> Path:
    return place.output / f"run-{run:06d}"


def ask(place: Place, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(place.database)) as connection, connection:
        return connection.execute(statement).fetchall()


def contents(at: Path) -> dict[Path, bytes]:
    """Return the bytes of every file, but for what SQLite keeps beside a database."""
    return {
        path: path.read_bytes()
        for path in at.rglob("*")
        if path.is_file() and ".sqlite-" not in path.name
    }


def days_ago(place: Place, run: int, days: int) -> None:
    """Let the last sign of life of a run be so old."""
    then = f"strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-{days} days')"
    ask(place, f"UPDATE attempts SET heartbeat_at = {then} WHERE run_id = {run}")
    ask(place, f"UPDATE runs SET started_at = {then} WHERE id = {run}")


# ---- What goes, and what stays


def test_the_files_go_and_the_history_stays(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    embed(REAL[:3], "--no-reuse")
    rows = ask(place, "SELECT * FROM checkpoints")
    other = contents(folder(place, 2))
    answer = script("prune", "--run", "1")
    assert answer.status == 0, answer.err
    assert answer.out.startswith("run 1: pruned, 3 files (")
    assert answer.out.endswith(f" removed from {folder(place)}\n")
    assert not folder(place).exists()
    assert contents(folder(place, 2)) == other
    assert ask(place, "SELECT * FROM checkpoints") == rows
    assert ask(place, "SELECT status FROM runs") == [("finished",), ("finished",)]
    shown = script("history", "--run", "1")
    assert "\nstatus               pruned\n" in shown.out
    assert "\npruned (UTC)         20" in shown.out
    assert "pruned, " in shown.out.split("\non disk  ")[1].split("\n")[0]
    detail = script("history", "--run", "1", "--json").json
    assert (detail["status"], detail["records_done"]) == ("pruned", 12)
    assert detail["pruned"] > detail["finished"]
    assert "  pruned  " in script("history").out
    assert "run 1 pruned: " in script("history", "--run", "1", "--watch").out
    again = script("prune", "--run", "1")
    assert (again.status, again.out) == (0, "run 1 is pruned already\n")
    assert ask(place, "SELECT pruned_at FROM runs WHERE id = 1") == [(detail["pruned"],)]


def test_every_other_command_says_that_the_run_is_pruned(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    script("prune", "--run", "1")
    to = place.folder / "there.csv"
    for name, *flags in [
        ("resume",),
        ("resume", "--recompute-damaged"),
        ("verify",),
        ("validate",),
        ("export", "--format", "csv", "--to", to),
        ("export", "--partial", "--format", "csv", "--to", to),
        ("neighbours", "--query", "1", "--to", to),
        ("crate", "--to", place.folder / "crate"),
    ]:
        answer = script(name, "--run", "1", *flags)
        assert answer.status == 2, (name, answer)
        assert answer.error.startswith("run 1: its files were pruned at 20")
        assert (answer.out, answer.err.count("\n")) == ("", 1)
    assert not to.exists()
    with pytest.raises(SettingsError, match=PRUNED_AT):
        open_run(place.database, 1)
    assert script("resume").error.startswith("no unfinished run in ")
    assert not folder(place).exists()


def test_the_questions_tell_pruned_from_unfinished_and_from_what_is_on_disk(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    sql = {one.text: one.sql for one in questions()}
    (unfinished,) = (text for name, text in sql.items() if "unfinished" in name)
    (disk,) = (text for name, text in sql.items() if "disk" in name)
    assert len(script("query", disk, "--json").json) == 1
    script("prune", "--run", "1")
    for statement in (unfinished, disk):
        assert script("query", statement, "--json").json == []
    for statement in sql.values():
        assert script("query", statement).status == 0


def test_what_is_not_listed_stays_and_is_named(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    there = folder(place)
    (there / "notes.txt").write_text("of a user")
    (there / "folder").mkdir()
    shutil.copy(there / "checkpoint-000001.parquet", there / "checkpoint-000009.parquet")
    (there / ".checkpoint-000002.parquet.kept-1").write_text("kept aside")
    (there / ".attempt-1-0.parquet.tmp").write_text("begun and never ended")
    (there / ".attempt-99-0.parquet.tmp").write_text("of nobody on record")
    answer = script("prune", "--run", "1")
    assert "run 1: pruned, 4 files" in answer.out
    assert answer.out.splitlines()[1] == (
        "run 1: left, as the run does not list it: .attempt-99-0.parquet.tmp, "
        ".checkpoint-000002.parquet.kept-1, checkpoint-000009.parquet, folder, notes.txt"
    )
    assert len({*there.iterdir()}) == 5
    again = script("prune", "--run", "1")
    assert again.out.splitlines()[0] == "run 1 is pruned already"
    assert again.out.splitlines()[1] == answer.out.splitlines()[1]
    assert (there / "notes.txt").read_text() == "of a user"
    assert len({*there.iterdir()}) == 5  # nor is a lock left


def of_another_size(path: Path) -> str:
    path.write_bytes(b"something else")
    return "14 bytes, "


def of_another_run(path: Path) -> str:
    """A file of the listed size; the row is changed, as the size of another run's file differs."""
    other = path.parent.parent / "run-000002" / "checkpoint-000001.parquet"
    shutil.copy(other, path)
    with closing(sqlite3.connect(path.parents[2] / "runs.sqlite")) as connection, connection:
        size = path.stat().st_size
        connection.execute("UPDATE checkpoints SET bytes = ? WHERE id = 1", [size])
    return "made by run uuid "


def of_other_positions(path: Path) -> str:
    second = path.with_name("checkpoint-000002.parquet")
    shutil.copy(second, path)
    with closing(sqlite3.connect(path.parents[2] / "runs.sqlite")) as connection, connection:
        size = path.stat().st_size
        connection.execute("UPDATE checkpoints SET bytes = ? WHERE id = 1", [size])
    return "its footer has other positions than the database"


def a_link(path: Path) -> str:
    path.rename(path.parents[2] / "moved.parquet")
    path.symlink_to(path.parents[2] / "moved.parquet")
    return "not a regular file"


def without_footer(path: Path) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return "footer not readable: "


@pytest.mark.parametrize(
    "alter",
    [of_another_size, of_another_run, of_other_positions, a_link, without_footer],
    ids=lambda one: one.__name__,
)
def test_a_file_that_is_not_the_listed_one_stays(
    script: Script, place: Place, embed: Callable[..., Answer], alter: Callable[[Path], str]
) -> None:
    embed()
    embed(REAL[:3], "--no-reuse")
    path = folder(place) / "checkpoint-000001.parquet"
    fact = alter(path)
    before = contents(place.folder)
    answer = script("prune", "--run", "1")
    assert answer.status == 0
    assert f"run 1: left checkpoint-000001.parquet: {fact}" in answer.out
    assert [*folder(place).iterdir()] == [path]
    gone = {one.name for one in before.keys() - contents(place.folder).keys()}
    assert gone == {".lock", "checkpoint-000002.parquet", "checkpoint-000003.parquet"}


def test_a_path_in_the_database_reaches_nothing_outside_the_folder(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    embed(REAL[:3], "--no-reuse")
    ask(place, "UPDATE checkpoints SET path = '../run-000002/' || path WHERE run_id = 1")
    other = contents(folder(place, 2))
    assert script("prune", "--run", "1").out.startswith("run 1: pruned, 0 files")
    # Nor if the row names the folder of another run.
    ask(place, f"UPDATE runs SET output_folder = '{folder(place, 2)}' WHERE id = 1")
    ask(place, "UPDATE checkpoints SET path = replace(path, '../run-000002/', '')")
    assert "checkpoint-000001.parquet" in script("prune", "--run", "1").out
    assert contents(folder(place, 2)) == other
    assert script("validate", "--run", "2").status == 0


def test_without_its_folder_a_run_is_recorded_as_pruned(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    folder(place).rename(place.folder / "elsewhere")
    assert script("prune", "--run", "1").out.startswith("run 1: pruned, 0 files (0 B)")
    assert not folder(place).exists()
    (place.folder / "elsewhere").rename(folder(place))  # as a disk that was not mounted
    assert script("prune", "--run", "1").out.startswith("run 1: pruned, 3 files")
    assert not folder(place).exists()


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["", "dry run"])
def test_what_may_be_on_a_disk_that_is_not_mounted_is_not_pruned(
    script: Script, place: Place, embed: Callable[..., Answer], flags: list[str]
) -> None:
    embed(REAL[:1])
    embed(REAL[:2], "--no-reuse")
    days_ago(place, 1, 91)
    whole = contents(folder(place))
    folder(place).rename(place.folder / "one")
    idle = script("prune", "--older-than", "90d", *flags)
    assert (idle.status, idle.out) == (0, "no run that old has files\n")
    assert idle.err == f"run 1: output folder {folder(place)}: no such folder\n"
    days_ago(place, 2, 91)
    both = script("prune", "--older-than", "90d", "--dry-run")
    assert both.err == idle.err
    assert both.out.startswith("run 2: would be pruned, 1 file (")
    (place.folder / "one").rename(folder(place))
    place.output.rename(place.folder / "unmounted")
    refused = script("prune", "--run", "1", *flags)
    fact = f"run 1: output folder {place.output}: no such folder"
    assert (refused.status, refused.error) == (4, fact)
    assert not place.output.exists()
    (place.folder / "unmounted").rename(place.output)
    assert ask(place, "SELECT pruned_at FROM runs") == [(None,), (None,)]
    kept = contents(folder(place))
    assert {path: kept[path] for path in whole} == whole
    assert script("validate", "--run", "1").status == 0


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_recorded(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:1])
    folder(place).chmod(0o555)
    for dry in ([], ["--dry-run"]):
        flags = ["--run", "1", *dry, "--config", place.config]
        answer = processes.run("prune", *flags, prepare=powerless)
        assert (answer.status, answer.error) == (4, f"{folder(place)}: not writable")
    folder(place).chmod(0o755)
    assert script("validate", "--run", "1").status == 0


def test_a_run_of_version_1_and_one_without_metadata_are_pruned(
    script: Script, place: Place
) -> None:
    shutil.copytree(DATA / "version_1", place.folder, dirs_exist_ok=True)
    assert script("upgrade").status == 0
    ask(place, f"UPDATE runs SET output_folder = '{place.output}/run-00000' || id")
    ask(place, "UPDATE runs SET esm2_config = NULL WHERE id = 1")
    files = len([*folder(place).glob("*.parquet")])
    assert files
    assert script("prune", "--run", "1").out.startswith(f"run 1: pruned, {files} file")
    assert not folder(place).exists()


# ---- What was piped in, and what was copied


def test_standard_input_that_was_kept_goes_unless_another_run_reads_it(
    script: Script, place: Place, small_model: Path
) -> None:
    source = write_fasta(place.folder / "piped.fasta", REAL[:3])
    flags = ["--esm-model", small_model, "--config", place.config]
    for _ in range(2):
        assert processes.run("embed", *flags, "--input", "-", into=source).status == 0
    (kept,) = folder(place, 1).glob(".stdin-*")
    assert script("embed", *flags, "--input", kept).status == 0
    assert script("prune", "--run", "2").out.startswith("run 2: pruned, 2 files")
    assert not folder(place, 2).exists()
    there = folder(place).rename(place.folder / "there")
    answer = script("prune", "--run", "1", "--output", there, "--dry-run")
    assert f"run 1: left {kept.name}: input of run 3\n" in answer.out
    there.rename(folder(place))
    answer = script("prune", "--run", "1")
    assert f"run 1: left {kept.name}: input of run 3\n" in answer.out
    assert script("validate", "--run", "3").status == 0
    script("prune", "--run", "3")
    assert script("prune", "--run", "1").out.startswith("run 1: pruned, 1 file (")
    assert not folder(place, 1).exists()


def test_a_pruned_run_is_no_source_and_says_nothing(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    assert "reused: 12 of 12" in embed().err
    script("prune", "--run", "1")
    answer = embed()
    assert "reused: 12 of 12 sequences, from run 2" in answer.err
    script("prune", "--run", "2")
    script("prune", "--run", "3")
    assert "reused" not in embed().err
    assert not folder(place, 2).exists()  # nor is its plan of reuse left
    # The runs that were copied are as complete as ever.
    assert script("history", "--run", "3", "--json").json["reused"] == 12


def test_an_altered_plan_of_reuse_stays(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    embed()
    (plan,) = folder(place, 2).glob(".reuse-*")
    plan.write_bytes(b"altered")
    answer = script("prune", "--run", "2")
    assert f"run 2: left {plan.name}: its bytes do not match their digest\n" in answer.out
    assert [*folder(place, 2).iterdir()] == [plan]


def test_a_source_that_is_pruned_while_it_is_copied_is_computed_from_there(
    script: Script, place: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    embed()
    flags = ["--esm-model", small_model, "--input", place.folder / "input-12.fasta", *QUICK]
    gate = place.folder / "gate"
    prepare = partial(processes.stop_at, "lib.jobs.reuse.verified_source", 5, gate)
    with processes.start("embed", *flags, "--config", place.config, prepare=prepare) as process:
        process.wait_for("reached")  # three were looked into, one copied
        assert script("prune", "--run", "1").status == 0
        (place.folder / "gate").touch()
        answer = process.end()
    assert answer.status == 0, answer.err
    lines = [line for line in answer.err.splitlines() if line.startswith("not reused: ")]
    assert len(lines) == 2
    assert all(line.endswith("no such regular file") for line in lines)
    assert 0 < script("history", "--run", "2", "--json").json["reused"] < 12
    assert script("validate", "--run", "2").status == 0
    assert script("verify", "--run", "2").status == 0


@pytest.mark.parametrize("nth", [1, 2], ids=["before a file was copied", "after the first"])
def test_a_resumed_run_computes_what_it_was_to_copy_from_a_pruned_one(
    script: Script, place: Place, small_model: Path, embed: Callable[..., Answer], nth: int
) -> None:
    embed()
    flags = ["--esm-model", small_model, "--input", place.folder / "input-12.fasta", *QUICK]
    dying = partial(processes.at_call, "lib.ledger.commit._row", nth, processes.die)
    done = processes.run("embed", *flags, "--config", place.config, prepare=dying)
    assert done.status == -signal.SIGKILL
    assert script("prune", "--run", "1").status == 0
    answer = script("resume", "--run", "2")
    assert answer.status == 0, answer.err
    (line,) = (one for one in answer.err.splitlines() if one.startswith("not reused: "))
    assert line.startswith("not reused: run 1: its files were pruned at 20")
    assert script("validate", "--run", "2").status == 0
    assert script("verify", "--run", "2").status == 0


# ---- Who owns it


@contextmanager
def stopped_in_a_commit(place: Place, model: Path) -> Iterator[processes.Process]:
    """Start a run that stops before its second checkpoint is listed, until the gate is there."""
    path = write_fasta(place.folder / "input.fasta", REAL)
    flags = ["--esm-model", model, "--input", path, *QUICK, "--config", place.config]
    gate = place.folder / "gate"
    prepare = partial(processes.stop_at, "lib.ledger.commit.add_checkpoint", 2, gate)
    with processes.start("embed", *flags, prepare=prepare) as process:
        process.wait_for("reached")
        yield process


def test_a_run_with_a_live_owner_is_refused(
    script: Script, place: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    with stopped_in_a_commit(place, small_model) as process:
        before = contents(place.folder)
        for dry in ([], ["--dry-run"]):
            answer = script("prune", "--run", "1", *dry)
            assert answer.status == 4
            assert answer.error.startswith(f"run 1: owned by process {process.pid} on ")
        days_ago(place, 1, 100)
        assert script("prune", "--older-than", "90d").out == "no run that old has files\n"
        assert contents(folder(place)) == {
            path: held for path, held in before.items() if path.is_relative_to(folder(place))
        }
        process.kill()
    assert script("history", "--run", "1", "--json").json["status"] == "killed"
    assert script("prune", "--older-than", "90d").out.startswith("run 1: pruned, ")
    assert not folder(place).exists()
    assert ask(place, "SELECT outcome FROM attempts") == [("lost",)]
    # It ended when it gave its last sign of life, not now.
    statement = "SELECT ended_at < pruned_at FROM attempts JOIN runs ON runs.id = run_id"
    assert ask(place, statement) == [(1,)]
    assert script("resume").error.startswith("no unfinished run in ")


def test_a_process_that_no_lock_reaches_can_commit_nothing_more(
    script: Script, place: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    with stopped_in_a_commit(place, small_model) as process:
        (folder(place) / ".lock").rename(place.folder / "lock")  # as on another machine
        assert script("prune", "--run", "1").status == 0
        (place.folder / "gate").touch()
        answer = process.end()
    assert answer.status == 4
    assert answer.error == "run 1: attempt 1 has lost it: it was pruned"
    assert len(ask(place, "SELECT id FROM checkpoints")) == 1
    assert not [*folder(place).glob("checkpoint-*")]


# ---- By age, and without doing it


def test_a_dry_run_says_what_would_go_and_changes_nothing(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    (folder(place) / "notes.txt").write_text("of a user")
    before = contents(place.folder)
    answer = script("prune", "--run", "1", "--dry-run")
    assert answer.status == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("run 1: would be pruned, 3 files (")
    sizes = script("prune", "--run", "1", "--dry-run", "--json").json[0]["files"]
    assert [line.split()[0] for line in lines[1:4]] == [*sizes]
    assert lines[4] == "run 1: left, as the run does not list it: notes.txt"
    assert sizes == {
        path.name: len(held) for path, held in before.items() if path.suffix == ".parquet"
    }
    assert contents(place.folder) == before
    assert script("validate", "--run", "1").status == 0
    (done,) = script("prune", "--run", "1", "--json").json
    assert (done["files"], done["left"]) == (sizes, {"notes.txt": "not listed"})
    assert done["bytes"] == sum(sizes.values())


def test_by_age_only_what_is_old_goes(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    for entries in (REAL[:2], REAL[2:4], REAL[4:6]):
        embed(entries)
    days_ago(place, 1, 91)
    days_ago(place, 2, 89)
    new = contents(folder(place, 2)) | contents(folder(place, 3))
    dry = script("prune", "--older-than", "90d", "--dry-run")
    assert "run 1: would be pruned" in dry.out
    assert "run 2" not in dry.out
    answer = script("prune", "--older-than", "90d")
    assert answer.out.startswith("run 1: pruned, 1 file (")
    assert answer.out.count("\n") == 1
    assert contents(folder(place, 2)) | contents(folder(place, 3)) == new
    assert script("prune", "--older-than", "90d").out == "no run that old has files\n"
    assert script("prune", "--older-than", "12w", "--json").json[0]["run"] == 2
    assert script("prune", "--older-than", "1h").out == "no run that old has files\n"
    assert folder(place, 3).exists()


def test_a_run_that_was_continued_meanwhile_is_not_old(
    script: Script, place: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(REAL[:1])
    monkeypatch.setattr("lib.ledger.pruning.idle_runs", lambda *_: [1])
    assert script("prune", "--older-than", "90d").out == "no run that old has files\n"
    assert script("validate", "--run", "1").status == 0


def test_rows_of_the_wrong_types_are_one_line(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:1])
    days_ago(place, 1, 100)
    ask(place, "UPDATE runs SET output_folder = x'ff'")
    for flags in (["--run", "1"], ["--older-than", "90d"], ["--older-than", "90d", "--dry-run"]):
        answer = script("prune", *flags)
        assert answer.status == 3
        assert answer.error.startswith("run 1: ")
    assert (folder(place) / "checkpoint-000001.parquet").exists()


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        ([], "--run or --older-than: one of them is needed, and not both"),
        (["--run", "1", "--older-than", "1d"], "one of them is needed, and not both"),
        (["--run", "7"], "run 7: not in database "),
        (["--older-than", "1d", "--output", "elsewhere"], "--output: only with --run"),
    ],
)
def test_what_is_refused(
    script: Script, place: Place, embed: Callable[..., Answer], flags: list[str], fact: str
) -> None:
    embed(REAL[:1])
    answer = script("prune", *flags)
    assert (answer.status, answer.err.count("\n")) == (2, 1)
    assert fact in answer.error


@pytest.mark.parametrize("age", ["90", "0d", "d", "-1d", "1 d", "999999d", "1m"])
def test_an_age_has_a_unit(place: Place, age: str) -> None:
    answer = processes.run("prune", f"--older-than={age}", "--config", place.config)
    assert answer.status == 2
    assert answer.err.endswith(f"{age}: not hours (12h), days (90d) or weeks (2w)\n")


# ---- Killed, and said again

STEPS = [
    ("lib.ledger.pruning._record", 1, False),
    ("lib.ledger.pruning._record", 1, True),
    ("lib.ledger.pruning._remove", 2, False),
    ("lib.ledger.pruning._remove", 5, False),
    ("lib.ledger.pruning._remove", 5, True),
]


def test_killed_at_each_step_it_can_be_said_again(
    script: Script, place: Place, embed: Callable[..., Answer]
) -> None:
    embed()
    embed()
    other = contents(folder(place, 1))
    shutil.copytree(folder(place, 2), place.folder / "whole")
    assert len([*folder(place, 2).iterdir()]) == 5  # as many as are removed, the lock last
    before = place.database.read_bytes()
    for target, nth, after in STEPS:
        for part in ("-wal", "-shm"):
            Path(f"{place.database}{part}").unlink(missing_ok=True)
        place.database.write_bytes(before)
        shutil.copytree(place.folder / "whole", folder(place, 2), dirs_exist_ok=True)
        dying = partial(processes.at_call, target, nth, processes.die, after=after)
        flags = ["--run", "2", "--config", place.config]
        done = processes.run("prune", *flags, prepare=dying)
        assert done.status == -signal.SIGKILL, (target, nth, done)
        is_recorded = target.endswith("_remove") or after
        assert (ask(place, "SELECT pruned_at FROM runs WHERE id = 2") != [(None,)]) == is_recorded
        if not is_recorded:
            assert script("validate", "--run", "2").status == 0
        answer = script("prune", "--run", "2")
        assert answer.status == 0, answer.err
        assert not folder(place, 2).exists()
        assert script("history", "--run", "2", "--json").json["status"] == "pruned"
    assert contents(folder(place, 1)) == other


def test_a_file_that_cannot_be_removed_is_one_line_and_it_can_be_said_again(
    script: Script, place: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed()
    true = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "checkpoint-000002.parquet":
            raise PermissionError(13, os.strerror(13))
        true(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    answer = script("prune", "--run", "1")
    assert answer.status == 4
    fact = "run 1: recorded as pruned, files are left (make prune RUN=1): "
    assert answer.error.startswith(fact)
    assert answer.error.endswith("checkpoint-000002.parquet: Permission denied")
    monkeypatch.undo()
    days_ago(place, 1, 2)
    assert script("prune", "--older-than", "1d").out.startswith("run 1: pruned, 2 files (")
    assert not folder(place).exists()


# ---- By make


def test_make_prune(place: Place, embed: Callable[..., Answer], quick_python: Path) -> None:
    embed(REAL[:1])
    flags = [f"CONFIG={place.config}", f"python={quick_python}"]
    refused = make("prune", *flags)
    assert refused.stderr.splitlines()[0].startswith("error: --run or --older-than: ")
    dry = make("prune", "RUN=1", "ARGS=--dry-run", *flags)
    assert "run 1: would be pruned, 1 file (" in dry.stdout
    assert make("prune", "ARGS=--older-than 90d", *flags).stdout == "no run that old has files\n"
    copy = shutil.copytree(place.output, place.folder / "copy")
    assert "not the one on record" in make("prune", "RUN=1", f"OUTPUT={copy}", *flags).stderr
    assert folder(place).exists()
    assert make("prune", "RUN=1", *flags).stdout.startswith("run 1: pruned, 1 file (")
    assert not folder(place).exists()
