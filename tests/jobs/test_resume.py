"""Resume: if this fails, an interrupted run loses work, repeats it, or ends with other vectors."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lib.ledger.footer import read_footer
from tests import processes
from tests.conftest import UNIPROT_PART, Place, Script
from tests.reference import assert_same_bits

# Small packs and checkpoints, so that there is much to interrupt.
QUICK = ["--set", "output.checkpoint_records=6", "--set", "compute.tokens_per_pack=450"]

POINTS = [
    ("lib.network.pipeline.launch", "before", 4),
    ("lib.ledger.commit.rename_into_place", "before", 2),
    ("lib.ledger.commit.rename_into_place", "after", 2),
    ("lib.ledger.commit.add_checkpoint", "after", 3),
    ("lib.jobs.embedding.finish_run", "before", 1),
]


def killed_at(place: Place, point: tuple[str, str, int], script: str, *argv: str | Path) -> None:
    """Run a script that kills itself before or after the nth call of a function."""
    target, when, nth = point
    dying = partial(processes.at_call, target, nth, processes.die, after=when == "after")
    done = processes.run(script, *argv, "--config", place.config, prepare=dying)
    assert done.status == -signal.SIGKILL, (point, done)


def embed_arguments(model: Path, include: list[str]) -> list[str | Path]:
    layers = ["--repr-layers", "1", "-1", "--include", *include]
    return ["--esm-model", model, "--input", UNIPROT_PART, *layers, *QUICK]


def test_killed_at_chosen_points_and_resumed_gives_the_same_bits(
    script: Script, place: Place, small_model: Path
) -> None:
    # More than one, whatever the tests are run with: the bits must not depend on their race.
    place.set("compute", "threads", 2)
    flags = embed_arguments(small_model, ["mean", "bos", "per_tok"])
    assert script("embed", *flags).status == 0
    for run, point in enumerate(POINTS, start=2):
        killed_at(place, point, "embed", *flags)
        history = script("history", "--run", str(run), "--json").json
        assert history["status"] == "killed"
        answer = script("resume", "--run", str(run))
        assert answer.status == 0, answer.err
        assert_same_bits(place.output / f"run-{run:06d}", place.output / "run-000001")
        listed = script("history", "--run", str(run), "--json").json
        names = {one["path"] for one in listed["checkpoints"]}
        assert {path.name for path in (place.output / f"run-{run:06d}").iterdir()} == {
            *names,
            ".lock",
        }
        assert [one["outcome"] for one in listed["attempts"]] == ["lost", "finished"]
        first = listed["attempts"][0]
        signs = [
            one["committed"] for one in listed["checkpoints"] if one["attempt"] == first["attempt"]
        ]
        assert first["ended"] == max([first["heartbeat"], *signs])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_too_a_resumed_run_has_the_same_bits(
    script: Script, place: Place, small_model: Path, precision: str
) -> None:
    flags = embed_arguments(small_model, ["mean", "per_tok"])
    flags += ["--set", f"compute.precision={precision}"]
    assert script("embed", *flags).status == 0
    killed_at(place, ("lib.ledger.commit.rename_into_place", "after", 2), "embed", *flags)
    other = script("resume", "--set", "compute.precision=float32")
    assert other.status == 3
    assert other.error == f"run 2: precision is {precision} in the run, float32 in its settings"
    assert script("resume").status == 0
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")


def test_killed_again_and_again_at_any_moment(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_arguments(small_model, ["mean", "bos", "per_tok"])
    assert script("embed", *flags).status == 0
    chance = random.Random(7)
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 1), "embed", *flags)
    for point in (
        ("lib.network.pipeline.launch", "after", chance.randint(1, 3)),
        ("lib.ledger.commit.rename_into_place", "after", chance.randint(1, 2)),
        ("lib.network.pipeline.launch", "before", chance.randint(1, 5)),
    ):
        killed_at(place, point, "resume")
    assert script("resume").status == 0
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")
    attempts = script("history", "--run", "2", "--json").json["attempts"]
    assert [one["outcome"] for one in attempts] == ["lost"] * 4 + ["finished"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_commits_what_is_finished(
    script: Script, place: Place, small_model: Path, number: signal.Signals, status: int
) -> None:
    flags = embed_arguments(small_model, ["mean"])
    gate = place.folder / "gate"
    prepare = partial(processes.stop_at, "lib.network.pipeline.launch", 4, gate)
    once = ["--config", place.config, "--set", "output.checkpoint_records=999"]
    with processes.start("embed", *flags, *once, prepare=prepare) as process:
        process.wait_for("reached")
        process.send_signal(number)
        process.wait_for("received")
        gate.touch()
        answer = process.end()
    assert answer.status == status
    told = f"{number.name}: run 1 interrupted, finished work committed"
    assert answer.error == f"{told} (make resume RUN=1)"
    shown = script("history", "--run", "1", "--json").json
    assert shown["attempts"][0]["error"] == told
    assert (shown["status"], shown["attempts"][0]["outcome"]) == ("interrupted", "interrupted")
    assert 0 < shown["records_done"] < shown["records_total"]
    assert script("resume").status == 0
    assert script("embed", *flags).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def interrupted_run(place: Place, model: Path) -> None:
    """Leave run 1 with two checkpoints, its process killed."""
    flags = embed_arguments(model, ["mean"])
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 2), "embed", *flags)


def test_settings_come_from_the_database_not_from_config_ini(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    place.set("output", "include", "per_tok")
    place.set("input", "max_residues", "10")
    place.set("model", "esm_model", "esm2_t6_8M_UR50D")
    assert script("resume").status == 0
    assert script("embed", *embed_arguments(small_model, ["mean"]),
                  "--set", "input.max_residues=1022").status == 0  # fmt: skip
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_weights_that_were_moved_and_renamed_continue_their_run(
    script: Script, place: Place, small_model: Path
) -> None:
    first = place.folder / "first" / "model.pt"
    first.parent.mkdir()
    shutil.copy(small_model, first)
    interrupted_run(place, first)
    moved = place.folder / "moved" / "renamed.pt"
    moved.parent.mkdir()
    first.rename(moved)
    gone = script("resume")
    assert gone.status == 2
    assert f"{first}: no such file" in gone.error
    assert script("resume", "--esm-model", moved).status == 0
    assert script("embed", *embed_arguments(moved, ["mean"])).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_an_input_that_was_moved_continues_its_run(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    moved = place.folder / "moved.fasta"
    shutil.copy(UNIPROT_PART, moved)
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 1), "resume", "--input", moved)
    rows = script("query", "select path from inputs union select input_path from runs", "--json")
    assert rows.json == [{"path": "./moved.fasta"}]  # as the next resume takes it
    assert script("resume").status == 0
    *_, last = sorted((place.output / "run-000001").glob("*.parquet"))
    assert read_footer(last)["inputs"][0]["path"] == str(moved)


def test_other_pack_sizes_may_continue_a_run_and_compute_every_record_once(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    answer = script("resume", "--set", "compute.tokens_per_pack=333", "--json")
    assert answer.status == 0
    rows = script("query", "select sum(records) as n from checkpoints", "--json").json
    assert rows == [{"n": 59}]
    attempts = script("query", "select tokens_per_pack as n from attempts", "--json").json
    assert [one["n"] for one in attempts] == [450, 333]


def test_settings_of_identity_cannot_be_changed_on_resume(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    for setting, fact in {
        "input.max_residues=500": "max_residues is 1022 in the run, 500 in its settings",
        "model.repr_layers=0": "repr_layers is [1, 2] in the run, [0] in its settings",
        "model.repr_layers=2 1": "repr_layers is [1, 2] in the run, [2, 1] in its settings",
        f"output.folder={place.folder}": (
            f"output folder is {place.output} in the run, {place.folder} in its settings"
        ),
    }.items():
        for name in ("resume", "verify", "validate"):
            answer = script(name, "--run", "1", "--set", setting)
            assert answer.status == 3, (name, setting)
            # What other settings make of the input, validate says, too.
            assert (answer.out.splitlines() or [answer.error])[0] == f"run 1: {fact}"
    deeper = script("resume", "--run", "1", "--set", "model.repr_layers=3")
    assert (deeper.status, deeper.error) == (2, "repr_layer 3 exceeds model depth 2")
    same = ["--set", "model.repr_layers=1 -1", "--set", f"output.folder={place.output}"]
    for name in ("validate", "resume"):
        assert script(name, "--run", "1", *same).status == 0


def test_resume_takes_the_newest_unfinished_run(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    flags = embed_arguments(small_model, ["bos"])
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 1), "embed", *flags)
    assert script("embed", *flags).status == 0
    for expected in (2, 1):
        assert script("resume", "--json").json["run"] == expected
    nothing = script("resume")
    assert nothing.status == 2
    assert nothing.error.startswith("no unfinished run in database")


def test_a_finished_run_is_left_as_it_is(script: Script, place: Place, small_model: Path) -> None:
    script("embed", *embed_arguments(small_model, ["mean"]))
    before = sorted((path, path.stat().st_mtime_ns) for path in place.output.rglob("*"))
    answer = script("resume", "--run", "1")
    assert answer.status == 0
    assert answer.out.startswith("run 1 finished: 59 records")
    assert sorted((path, path.stat().st_mtime_ns) for path in place.output.rglob("*")) == before
    assert len(script("history", "--run", "1", "--json").json["attempts"]) == 1


def test_a_run_has_one_live_owner(script: Script, place: Place, small_model: Path) -> None:
    interrupted_run(place, small_model)
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = place.output / "run-000001" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        answer = script("resume", "--run", "1")
        assert answer.status == 4
        assert "owned by process" in answer.error
        (attempt,) = script("history", "--run", "1", "--json").json["attempts"]
        assert answer.error == (
            f"run 1: owned by process {attempt['pid']} on {os.uname().nodename} "
            f"since {attempt['started']}"
        )
        assert script("history", "--json").json[0]["status"] == "running"
        answer = script("export", "--run", "1", "--format", "npy", "--to", place.folder / "out")
        assert answer.error.startswith("run 1: running, ")
        other.kill()
    assert script("resume", "--run", "1").status == 0


def test_a_dead_owners_number_that_lives_again_does_not_own_the_run(
    script: Script, place: Place, small_model: Path
) -> None:
    interrupted_run(place, small_model)
    with closing(sqlite3.connect(place.database)) as database, database:
        database.execute("UPDATE attempts SET pid = ?", [os.getpid()])
    assert script("history", "--json").json[0]["status"] == "killed"
    # Everybody else says the same.
    assert script("validate", "--run", "1").out.startswith("run 1 (killed): identity good, ")
    export = ["export", "--run", "1", "--format", "npy", "--to", place.folder / "out", "--json"]
    assert script(*export).error.startswith("run 1: killed, ")
    assert script(*export, "--partial").json["status"] == "killed"
    assert script("resume", "--run", "1").status == 0


def damage(path: Path, kind: str) -> None:
    if kind == "altered":
        content = bytearray(path.read_bytes())
        content[200] ^= 0xFF
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "a directory":
        path.unlink()
        path.mkdir()
    elif kind == "a link":
        target = path.with_name("elsewhere")
        path.rename(target)
        path.symlink_to(target)


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        ("altered", "its bytes do not match their digest"),
        ("truncated", "footer not readable"),
        ("emptied", "footer not readable"),
        ("missing", "no such file"),
        ("a directory", "not a regular file"),
        ("a link", "not a regular file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    script: Script, place: Place, small_model: Path, kind: str, fact: str
) -> None:
    interrupted_run(place, small_model)
    damage(place.output / "run-000001" / "checkpoint-000002.parquet", kind)
    answer = script("resume", "--run", "1")
    assert answer.status == 3
    assert answer.error.startswith("run 1: checkpoint-000002.parquet: ")
    assert fact in answer.error
    audit = script("validate", "--run", "1")
    assert audit.status == 3
    assert fact in audit.out


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, --recompute-damaged set the good file aside and computed it again."""
    interrupted_run(place, small_model)
    shut = place.output / "run-000001" / "checkpoint-000002.parquet"
    names = {path.name for path in shut.parent.iterdir()}
    true = Path.open

    def refused(path: Path, *how: Any, **named: Any) -> Any:  # noqa: ANN401
        if path == shut:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return true(path, *how, **named)

    monkeypatch.setattr(Path, "open", refused)
    fact = f"{shut}: Permission denied"
    for argv in (
        ["resume"],
        ["resume", "--recompute-damaged"],
        ["relocate", "--output", shut.parent],
    ):
        answer = script(*argv, "--run", "1")
        assert (answer.status, answer.error) == (4, fact)
    audit = script("validate", "--run", "1")
    assert (audit.status, fact in audit.out) == (4, True)
    monkeypatch.undo()
    assert {path.name for path in shut.parent.iterdir()} == names
    assert script("resume", "--run", "1").status == 0


def test_recompute_damaged_drops_and_computes_again(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_arguments(small_model, ["mean"])
    assert script("embed", *flags).status == 0
    assert script("embed", *flags).status == 0
    folder = place.output / "run-000001"
    damage(folder / "checkpoint-000002.parquet", "altered")
    damage(folder / "checkpoint-000004.parquet", "missing")
    damage(folder / "checkpoint-000005.parquet", "truncated")
    refused = script("resume", "--run", "1")
    assert refused.status == 3
    for number in (2, 4, 5):
        assert f"checkpoint-{number:06d}.parquet" in refused.error
    answer = script("resume", "--run", "1", "--recompute-damaged")
    assert answer.status == 0, answer.err
    for number in (2, 5):
        name = f"checkpoint-{number:06d}.parquet"
        kept = f".{name}.kept-1"
        assert f"run 1: {name}: dropped, kept as {kept}, to be computed again" in answer.err
        assert (folder / kept).exists()
    assert "checkpoint-000004.parquet: dropped, to be computed again" in answer.err
    assert_same_bits(folder, place.output / "run-000002")
    assert script("validate", "--run", "1").status == 0


def test_recompute_killed_and_resumed_gives_the_same_bits(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_arguments(small_model, ["mean"])
    for _ in range(2):
        assert script("embed", *flags).status == 0
    folder = place.output / "run-000001"
    points = [
        ("scripts.resume.adopt_leftovers", "before", 1),
        ("lib.ledger.commit.rename_into_place", "after", 1),
    ]
    for point in points:
        damage(sorted(folder.glob("checkpoint-*.parquet"))[2], "altered")
        flag = ["--run", "1", "--recompute-damaged"]
        killed_at(place, point, "resume", *flag)
        assert script("history", "--run", "1", "--json").json["status"] == "killed"
        assert script("resume", "--run", "1").status == 0
        assert_same_bits(folder, place.output / "run-000002")


def test_recompute_killed_before_the_record_changes_is_asked_for_again(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_arguments(small_model, ["mean"])
    for _ in range(2):
        assert script("embed", *flags).status == 0
    folder = place.output / "run-000001"
    damage(folder / "checkpoint-000003.parquet", "altered")
    flag = ["--run", "1", "--recompute-damaged"]
    killed_at(place, ("scripts.resume.start_attempt", "before", 1), "resume", *flag)
    assert script("resume", "--run", "1").error.endswith("checkpoint-000003.parquet: no such file")
    assert script("resume", *flag).status == 0
    assert_same_bits(folder, place.output / "run-000002")


def test_a_file_that_a_kill_left_between_rename_and_commit_is_adopted(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = embed_arguments(small_model, ["mean", "per_tok"])
    killed_at(place, ("lib.ledger.commit.rename_into_place", "after", 2), "embed", *flags)
    stray = place.output / "run-000001" / "checkpoint-000002.parquet"
    mine = place.output / "run-000001" / "notes.txt"
    mine.write_text("a user's own")
    before = stray.read_bytes(), stray.stat().st_mtime_ns
    answer = script("resume")
    assert answer.status == 0
    assert f"run 1: {stray.name}: not in the database, verified and adopted" in answer.err
    assert (stray.read_bytes(), stray.stat().st_mtime_ns) == before
    assert mine.read_text() == "a user's own"
    mine.unlink()
    assert script("embed", *flags).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")
    assert script("validate", "--run", "1").status == 0
