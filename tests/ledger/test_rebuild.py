"""Rebuilding: if this fails, a lost run database takes with it which model made each file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lib.embeddings import open_run
from lib.ledger.ownership import take_lock
from schema.parquet import FOOTER_KEY
from tests import processes
from tests.conftest import DATA, WHOLE_PROTEINS
from tests.ledger.conftest import QUICK, Call, ask, contents, folder
from tests.reference import assert_same_bits
from tests.test_make import make

# The project is embedded once.
pytestmark = pytest.mark.xdist_group("moves")
LOST_OF_RUNS = {"finished_at", "model_id"}
LOST_OF_CHECKPOINTS = {"id", "attempt_id", "committed_at"}


def rows(project: Path, table: str, without: set[str]) -> list[dict[str, object]]:
    names = [
        str(name) for (name,) in ask(project, f"SELECT name FROM pragma_table_info('{table}')")
    ]
    kept = [name for name in names if name not in without]
    # Footers have milliseconds.
    shown = ["round(seconds, 3)" if name == "seconds" else name for name in kept]
    order = "run_id, first_position" if table == "checkpoints" else "id"
    found = ask(project, f"SELECT {', '.join(shown)} FROM {table} ORDER BY {order}")
    return [dict(zip(kept, row, strict=True)) for row in found]


def lose_database(project: Path) -> None:
    for path in project.glob("runs.sqlite*"):
        path.unlink()


def footers_without_totals(at: Path, was_at: Path, project: Path) -> None:
    """Make the files of a folder what they were before footers had totals, in a project."""
    for path in at.glob("*.parquet"):
        table = pq.read_table(path)
        text = pq.read_metadata(path).metadata[FOOTER_KEY].decode()
        footer = json.loads(text.replace(str(was_at), str(project)))
        del footer["totals"]
        for one in footer["inputs"]:
            del one["bytes"]
        metadata = {FOOTER_KEY: json.dumps(footer).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path, write_page_checksum=True)


def test_all_that_footers_know_is_on_record_again(
    call: Call, project: Path, reading_threads: set[int]
) -> None:
    flags = ["--esm-model", project / "models" / "small.pt", "--input", project / "proteins.fasta"]
    assert "reused: 12 of 12" in call("embed", *flags, *QUICK).err  # run 3, from 1
    tables = {"runs": LOST_OF_RUNS, "inputs": set[str](), "checkpoints": LOST_OF_CHECKPOINTS}
    before = {table: rows(project, table, without) for table, without in tables.items()}
    models = rows(project, "models", set())
    files = contents(project / "embeddings")
    lose_database(project)
    reading_threads.clear()
    answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 0, answer.err
    assert reading_threads == {threading.get_native_id()}
    lines = answer.out.splitlines()
    assert lines[0] == (
        f"run 1 finished: {len([*folder(project).glob('*.parquet')])} checkpoints with 12 of 12 "
        f"records in {folder(project)}"
    )
    assert lines[1].startswith("run 2 interrupted: ")
    assert lines[-1].startswith("not in the footers: attempts, machines, ")
    for table, without in tables.items():
        assert rows(project, table, without) == before[table]
    assert rows(project, "models", set()) == models
    assert contents(project / "embeddings") == files
    for run in ("1", "3"):
        assert call("validate", "--run", run).status == 0
        assert call("verify", "--run", run, "--sample", "1").status == 0
    assert call("crate", "--run", "1", "--to", project / "crate").status == 0
    assert call("report", "--run", "1").status == 0
    shown = call("history", "--run", "1").out
    assert "unknown (unknown)" in shown
    assert "  rebuilt  " in shown
    # The next run has a number that none of them had.
    assert call("embed", *flags, "--no-reuse", "--json").json["run"] == 4


def test_an_unfinished_run_goes_on_to_the_same_bits(call: Call, project: Path) -> None:
    lose_database(project)
    assert call("rebuild", "--output", folder(project, 2)).status == 0
    answer = call("resume")
    assert answer.status == 0, answer.err
    assert answer.out.startswith("run 2 finished: 12 records ")
    assert_same_bits(folder(project, 2), folder(project, 1))
    assert call("rebuild", "--output", project / "embeddings").status == 0
    outcomes = ask(project, "SELECT run_id, outcome FROM attempts ORDER BY id")
    assert outcomes == [(2, "rebuilt"), (2, "finished"), (1, "rebuilt")]


def test_nothing_on_record_is_changed(call: Call, project: Path) -> None:
    before = rows(project, "runs", set())
    answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 0
    assert answer.out.splitlines() == [
        f"{folder(project, run)}: run {run} is on record already" for run in (1, 2)
    ]
    lose_database(project)
    flags = ["--esm-model", project / "models" / "small.pt", "--input", project / "proteins.fasta"]
    assert call("embed", *flags, "--json", "--output", project / "new").json["run"] == 1
    made = ask(project, "SELECT uuid FROM runs")
    answer = call("rebuild", "--output", project / "embeddings", "--json")
    assert answer.status == 3
    first, second = answer.json
    assert (first["run"], second["run"]) == (None, 2)
    assert first["status"] == (f"run 1 of uuid {before[0]['uuid']}: run 1 here is {made[0][0]}")
    assert ask(project, "SELECT uuid FROM runs WHERE id = 1") == made


def test_altered_and_strange_files_are_left_out_and_named(call: Call, project: Path) -> None:
    names = sorted(path.name for path in folder(project).glob("*.parquet"))
    altered = folder(project) / names[0]
    content = bytearray(altered.read_bytes())
    content[300] ^= 1  # in a page: where a footer begins depends on the length of paths
    altered.write_bytes(content)
    shutil.copy(folder(project, 2) / names[0], folder(project) / "checkpoint-000100.parquet")
    before = contents(folder(project))
    lose_database(project)
    answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 3
    lines = answer.out.splitlines()
    assert lines[0].startswith("run 1 interrupted: ")
    assert lines[1].startswith(f"run 1: {names[0]}: left out: ")
    uuid = ask(project, "SELECT uuid FROM runs WHERE id = 2")[0][0]
    assert lines[2] == f"run 1: checkpoint-000100.parquet: left out: made by run uuid {uuid}"
    assert contents(folder(project)) == before
    (folder(project) / "checkpoint-000100.parquet").unlink()
    answer = call("resume", "--run", "1")
    assert answer.status == 0, answer.err
    assert f"{names[0]}: not in the database, kept as " in answer.err
    assert len(open_run(project / "runs.sqlite", 1)) == 12


def test_a_run_whose_source_is_gone_is_whole(call: Call, project: Path) -> None:
    flags = ["--esm-model", project / "models" / "small.pt", "--input", project / "proteins.fasta"]
    assert "reused: 12 of 12" in call("embed", *flags, *QUICK).err
    sources = ask(project, "SELECT reused_run_id FROM checkpoints WHERE run_id = 3 ORDER BY path")
    lose_database(project)
    assert call("rebuild", "--output", folder(project, 3)).status == 0
    assert call("validate", "--run", "3").status == 0
    assert ask(project, "SELECT reused_run_id FROM checkpoints ORDER BY path") == sources
    (folder(project, 3) / f".reuse-{ask(project, 'SELECT uuid FROM runs')[0][0]}").unlink()
    lose_database(project)
    answer = call("rebuild", "--output", folder(project, 3))
    assert "lost or altered, so that it cannot be resumed" in answer.out
    assert len(open_run(project / "runs.sqlite", 3).matrix()) == 12


def test_files_without_totals_are_counted_in_their_input(
    call: Call, made: Path, project: Path
) -> None:
    for run in (1, 2):
        footers_without_totals(folder(project, run), made, project)
    unknown = LOST_OF_RUNS | {"started_at", "settings"}
    before = rows(project, "runs", unknown)
    lose_database(project)
    source = (project / "proteins.fasta").rename(project / "hidden.fasta")
    answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 3
    assert "footers without totals, and its input: " in answer.out
    assert not ask(project, "SELECT id FROM runs")
    source.rename(project / "proteins.fasta")
    answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 0, answer.out
    assert "run 1: its footers have no totals: counted in its input" in answer.out
    assert rows(project, "runs", unknown) == before
    assert call("resume").status == 0
    assert_same_bits(folder(project, 2), folder(project, 1))


def test_runs_of_version_1_are_rebuilt(call: Call, made: Path, tmp_path: Path) -> None:
    project = shutil.copytree(DATA / "version_1", tmp_path / "old")
    shutil.copy(WHOLE_PROTEINS, project)
    shutil.copy(made / "config.ini", project)
    assert call("upgrade", at=project).status == 0
    unknown = {"started_at", "settings", "output_folder", "input_path"}
    # Of version 1 nobody counted them; the rebuilding does, as it reads the input.
    unknown |= {"records_nucleotide_like", "records_with_gaps"}
    before = rows(project, "runs", LOST_OF_RUNS | unknown)
    files = rows(project, "checkpoints", LOST_OF_CHECKPOINTS | {"seconds"})
    lose_database(project)
    answer = call("rebuild", "--output", project / "embeddings", at=project)
    assert answer.status in (0, 3), answer.err
    assert rows(project, "runs", LOST_OF_RUNS | unknown)[:2] == before[:2]
    assert [one for one in rows(project, "checkpoints", LOST_OF_CHECKPOINTS | {"seconds"})
            if one["run_id"] != 3] == [one for one in files if one["run_id"] != 3]  # fmt: skip
    assert call("validate", "--run", "1", at=project).status == 0
    assert call("resume", "--run", "2", at=project).status == 0


def test_what_a_live_process_owns_is_left_alone(call: Call, project: Path) -> None:
    lose_database(project)
    with take_lock(folder(project, 2)):
        answer = call("rebuild", "--output", project / "embeddings")
    assert answer.status == 3
    assert f"{folder(project, 2)}: a live process owns its run" in answer.out.splitlines()
    assert ask(project, "SELECT id FROM runs") == [(1,)]


def test_without_files_nothing_is_made(call: Call, project: Path) -> None:
    lose_database(project)
    for place in ("models", "none"):
        answer = call("rebuild", "--output", project / place)
        assert answer.status == 2
        assert answer.error == f"output folder {project / place}: no checkpoint file in it"
    assert not (project / "runs.sqlite").exists()


def test_a_folder_that_may_not_be_read_is_named(
    call: Call, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the output folder was, which may be read."""
    true = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path == folder(project, 2):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return true(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    answer = call("rebuild", "--output", project / "embeddings")
    assert (answer.status, answer.error) == (4, f"{folder(project, 2)}: Permission denied")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", "one"), ("identity", {}), ("identity", []), ("totals", {}), ("inputs", {"a": 1}),
        ("settings", None), ("reused", {"run": "x"}), ("residues", "many"),
        ("settings", {"model": None}), ("run", 2**70),
    ],
)  # fmt: skip
def test_a_footer_of_the_wrong_types_is_one_line(
    call: Call, project: Path, key: str, value: object
) -> None:
    for path in folder(project).glob("*.parquet"):
        table = pq.read_table(path)
        footer = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY]) | {key: value}
        metadata = {FOOTER_KEY: json.dumps(footer).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    lose_database(project)
    answer = call("rebuild", "--output", folder(project))
    assert answer.status == 3, answer
    assert answer.out.startswith(f"{folder(project)}: ")
    assert answer.out.count("\n") == 1
    assert ask(project, "SELECT count(*) FROM runs") == [(0,)]


def test_killed_in_the_middle_it_can_be_said_again(call: Call, project: Path) -> None:
    lose_database(project)
    flags = ["--output", project / "embeddings", "--config", project / "config.ini"]
    done = processes.run("rebuild", *flags, prepare=_die_in_the_second_run)
    assert done.status == -9
    assert ask(project, "SELECT id, status FROM runs") == [(1, "finished")]
    assert call("rebuild", *flags).status == 0
    assert len(ask(project, "SELECT id FROM runs")) == 2


def _die_in_the_second_run() -> None:
    processes.at_call("lib.ledger.rebuilding._attempt", 2, processes.die)


def test_make_rebuild(project: Path, quick_python: Path) -> None:
    lose_database(project)
    flags = [f"OUTPUT={project / 'embeddings'}", f"CONFIG={project / 'config.ini'}"]
    answer = make("rebuild", *flags, f"python={quick_python}")
    assert answer.stdout.startswith("run 1 finished: "), answer.stderr
