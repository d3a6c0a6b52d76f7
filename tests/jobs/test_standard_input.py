"""Standard input: if these fail, what was piped in is lost, and its run cannot be resumed."""

from __future__ import annotations

import fcntl
import gzip
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from uuid import UUID

import pyarrow.parquet as pq
import pytest

from lib.ledger import standard_input
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script, users_environment
from tests.jobs.test_embed import fail
from tests.jobs.test_identity import sql
from tests.reference import assert_same_bits, fasta

Feed = Callable[[Path], None]

QUICK = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]


def embed(model: Path, source: str | Path = "-") -> list[str | Path]:
    return ["--esm-model", model, "--input", source, *QUICK]


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Make a file the standard input of the next script."""
    with ExitStack() as opened:

        def feed(path: Path) -> None:
            monkeypatch.setattr("sys.stdin", opened.enter_context(path.open()))

        yield feed


@pytest.fixture
def piped(feed: Feed) -> None:
    """Standard input is the fifteen proteins."""
    feed(SOME_PROTEINS)


def feed_process(path: Path, then: processes.Work) -> None:
    sys.stdin = path.open()
    then()


def kept(place: Place, run: int = 1) -> list[Path]:
    return sorted((place.output / f"run-{run:06d}").glob(".stdin-*"))


def test_a_shell_pipes_into_make(place: Place, small_model: Path, quick_python: Path) -> None:
    command = f"cat {SOME_PROTEINS} | make embed INPUT=- MODEL={small_model} CONFIG={place.config}"
    command += f" python={quick_python}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=users_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "input standard input: 15 records" in done.stderr
    (copy,) = kept(place)
    assert copy.read_bytes() == SOME_PROTEINS.read_bytes()


@pytest.mark.usefixtures("piped")
def test_the_copy_is_on_record_and_nobody_reads_it_as_vectors(
    script: Script, place: Place, small_model: Path
) -> None:
    answer = script("embed", *embed(small_model), "--json")
    assert answer.status == 0, answer.err
    (copy,) = kept(place)
    assert re.fullmatch(r"\.stdin-[0-9a-f]{8}\.fasta", copy.name)
    assert answer.json["inputs"] == [str(copy)]
    (row,) = script("query", "select * from record_files", "--json").json
    assert (row["file"], row["records"]) == (f"./{copy.relative_to(place.folder)}", 15)
    assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 0
    digests = "select distinct input_sha256 from runs"
    assert len(script("query", digests, "--json").json) == 1
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")
    assert pq.read_table(place.output / "run-000001").num_rows == 15
    assert {path.name for path in place.output.iterdir()} == {"run-000001", "run-000002"}
    for name in ("validate", "resume", "verify"):
        assert script(name, "--run", "1").status == 0


@pytest.mark.parametrize(
    ("point", "when"),
    [
        ("lib.ledger.commit.add_checkpoint", 2),
        ("lib.network.pipeline.launch", 1),
    ],
)
def test_a_killed_run_of_standard_input_is_resumed_by_itself(
    script: Script, place: Place, small_model: Path, point: str, when: int
) -> None:
    dying = partial(processes.at_call, point, when, processes.die)
    answer = processes.run(
        "embed", *embed(small_model), "--config", place.config,
        prepare=partial(feed_process, SOME_PROTEINS, dying),
    )  # fmt: skip
    assert answer.status == -signal.SIGKILL
    assert script("resume").status == 0
    assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_a_copy_that_was_altered_or_lost_is_refused(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    feed(SOME_PROTEINS)
    assert script("embed", *embed(small_model)).status == 0
    (copy,) = kept(place)
    shutil.copy(SOME_PROTEINS, place.folder / "saved.fasta")
    copy.write_bytes(copy.read_bytes()[:-2])
    answer = script("resume", "--run", "1")
    assert answer.status == 3
    assert answer.error.startswith("run 1: sha256 of the input is ")
    copy.unlink()
    assert script("resume", "--run", "1").error == f"{copy}: no such file"
    assert script("resume", "--run", "1", "--input", place.folder / "saved.fasta").status == 0


def test_standard_input_stands_among_files(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    lines = SOME_PROTEINS.read_text().split(">")[1:]
    for name, part in {"a": lines[:4], "b.gz": lines[4:9], "c": lines[9:]}.items():
        text = "".join(f">{one}" for one in part).encode()
        content = gzip.compress(text) if name == "b.gz" else text
        (place.folder / name).write_bytes(content)
    feed(place.folder / "b.gz")
    files = [place.folder / "a", "-", place.folder / "c"]
    flags = ["--esm-model", small_model, *QUICK]
    assert script("embed", *flags, "--input", *files).status == 0
    files[2] = (place.folder / "c").rename(place.folder / "moved")
    (place.output / "run-000001" / "checkpoint-000003.parquet").unlink()
    again = ["resume", "--run", "1", "--recompute-damaged"]
    assert script(*again).error == f"{place.folder / 'c'}: no such file"
    assert script(*again, "--input", *files).status == 0
    assert script("validate", "--run", "1").status == 0  # as it remembers
    (copy,) = kept(place)
    paths = script("query", "select file from record_files", "--json").json
    assert [row["file"] for row in paths] == [
        "./a",
        f"./{copy.relative_to(place.folder)}",
        "./moved",
    ]
    assert script("embed", *flags, "--input", SOME_PROTEINS).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")
    twice = script("embed", *flags, "--input", "-", "-")
    assert (twice.status, twice.error) == (2, "standard input (-) stands twice in the input")


# ---- What is refused


def nothing_is_left(place: Place) -> bool:
    return not place.output.exists()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("", "standard input: no records"),
        ("MKTAY\n", "standard input: line 1: expected '>' at the beginning of a record, got "
                    "'MKTAY'"),
        (">a\nM6\n", "record 0 (a): '6' at residue 2 is not in the ESM-2 alphabet"),
    ],
    ids=["empty", "not FASTA", "faulty"],
)  # fmt: skip
def test_what_is_piped_is_refused_like_a_file_and_not_kept(
    script: Script, place: Place, small_model: Path, feed: Feed,
    content: str, fact: str,
) -> None:  # fmt: skip
    (place.folder / "piped").write_text(content)
    feed(place.folder / "piped")
    answer = script("embed", *embed(small_model))
    assert (answer.status, answer.error) == (2, fact)
    assert nothing_is_left(place)


def test_a_terminal_as_standard_input_is_refused(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        for name in ("embed", "validate"):
            answer = script(name, "--esm-model", small_model, "--input", "-")
            assert answer.status == 2
            assert answer.error == "standard input is a terminal: nothing is piped into it"
    assert nothing_is_left(place)
    monkeypatch.setattr("sys.stdin", None)
    assert script("embed", *embed(small_model)).error == "standard input is closed"


def test_a_full_disk_is_one_line_and_nothing_is_left(place: Place, small_model: Path) -> None:
    limit = partial(processes.limit_files, SOME_PROTEINS.stat().st_size - 1)
    answer = processes.run(
        "embed", *embed(small_model), "--config", place.config,
        prepare=partial(feed_process, SOME_PROTEINS, limit),
    )  # fmt: skip
    assert answer.status == 4
    assert re.fullmatch(rf"{place.output}/\.stdin-.*\.tmp: File too large", answer.error)
    assert nothing_is_left(place)


def test_a_disk_that_is_full_for_the_plan_of_reuse_leaves_no_copy(
    script: Script, place: Place, small_model: Path
) -> None:
    """Before, the copy stayed under both of its names."""
    assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 0
    full = partial(
        processes.at_call, "lib.ledger.runs.write_plan", 1, partial(processes.limit_files, 100)
    )
    answer = processes.run(
        "embed", *embed(small_model), "--reuse", "--config", place.config,
        prepare=partial(feed_process, SOME_PROTEINS, full),
    )  # fmt: skip
    assert answer.status == 4
    assert re.fullmatch(rf"{place.output}/run-000002/\.reuse-.*: .*File too large.*", answer.error)
    assert [path.name for path in (place.output / "run-000002").iterdir()] == [".lock"]
    assert {path.name for path in place.output.iterdir()} == {"run-000001", "run-000002"}
    assert len(script("history", "--json").json) == 1


def test_a_signal_while_reading_leaves_nothing(place: Place, small_model: Path) -> None:
    fifo = place.folder / "fifo"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)  # so that neither end waits for the other
    dying = partial(processes.say, "reading")
    prepare = partial(feed_process, fifo, partial(
        processes.at_call, "lib.ledger.standard_input._copy", 1, dying))  # fmt: skip
    flags = [*embed(small_model), "--config", place.config]
    with processes.start("embed", *flags, prepare=prepare) as process:
        process.wait_for("reading")
        process.send_signal(signal.SIGTERM)
        answer = process.end()
    os.close(writer)
    assert (answer.status, answer.error) == (143, "SIGTERM: interrupted")
    assert nothing_is_left(place)


def test_a_run_continues_with_its_copy_alone(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    feed(SOME_PROTEINS)
    assert script("embed", *embed(small_model)).status == 0
    assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 0
    (place.folder / "other").write_text(">a\nMK\n")
    for name in ("resume", "validate", "verify"):
        feed(place.folder / "other")
        kept = script(name, "--run", "1", "--input", "-")
        assert kept.status == 0, (name, kept)
        assert sys.stdin.read() == ">a\nMK\n"  # which nobody has read
        answer = script(name, "--run", "2", "--input", "-")  # which kept none
        fact = "standard input (-) is only read for a new run"
        assert fact in (answer.out + answer.err), name
        assert answer.status == 2


# ---- validate


@pytest.mark.parametrize("argv", [["validate"], ["embed", "--validate-config"]])
def test_validate_reads_it_and_keeps_nothing(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, feed: Feed,
    argv: list[str],
) -> None:  # fmt: skip
    temporary = place.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    feed(SOME_PROTEINS)
    answer = script(argv[0], "--esm-model", small_model, "--input", "-", *argv[1:])
    assert answer.status == 0, answer.err
    assert "input standard input: 15 records" in answer.out
    assert nothing_is_left(place)
    assert not list(temporary.iterdir())


# ---- What a kill leaves


def die_in_preflight(place: Place, model: Path) -> None:
    dying = partial(processes.at_call, "scripts.embed.preflight", 1, processes.die)
    answer = processes.run(
        "embed", *embed(model), "--config", place.config,
        prepare=partial(feed_process, SOME_PROTEINS, dying),
    )  # fmt: skip
    assert answer.status == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    die_in_preflight(place, small_model)
    (left,) = place.output.iterdir()
    assert left.read_bytes() == SOME_PROTEINS.read_bytes()
    foreign = shutil.copy(left, place.output / ".stdin-another-machine-1.tmp")
    feed(SOME_PROTEINS)
    assert script("embed", *embed(small_model)).status == 0
    assert {path.name for path in place.output.iterdir()} == {"run-000001", Path(foreign).name}


def test_what_a_living_process_reads_is_left_alone(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    gate = place.folder / "gate"
    pausing = partial(processes.at_call, "scripts.embed.preflight", 1,
                      partial(processes.pause, gate))  # fmt: skip
    prepare = partial(feed_process, SOME_PROTEINS, pausing)
    flags = [*embed(small_model), "--config", place.config]
    with processes.start("embed", *flags, prepare=prepare) as process:
        process.wait_for("reached")
        feed(SOME_PROTEINS)
        assert script("embed", *embed(small_model)).status == 0
        gate.touch()
        assert process.end().status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def killed_in_create_run(place: Place, model: Path, target: str, *, after: bool) -> Path:
    """Kill a process that has named the copy of standard input; return the copy.

    The next process has its number, as in a container, where numbers begin at 1.
    """
    dying = partial(processes.at_call, target, 1, processes.die, after=after)
    flags = [*embed(model), "--config", place.config]
    prepare = partial(feed_process, SOME_PROTEINS, dying)
    assert processes.run("embed", *flags, prepare=prepare).status == -signal.SIGKILL
    (left,) = kept(place)
    (temporary,) = place.output.glob("*.tmp")
    assert temporary.samefile(left)
    temporary.rename(place.output / f".stdin-{socket.gethostname()}-{os.getpid()}.tmp")
    return left


def test_a_copy_whose_run_is_not_on_record_is_removed_by_the_next_run(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    target = "lib.ledger.runs.keep_in_folder"
    left = killed_in_create_run(place, small_model, target, after=True)
    assert script("history", "--json").json == []
    somebodys = left.with_name(".stdin-00000000.fasta")  # which no killed process of ours has left
    somebodys.write_text("somebody's")
    feed(SOME_PROTEINS)
    assert script("embed", *embed(small_model)).status == 0
    assert kept(place) == [somebodys]
    (copy,) = kept(place, 2)
    stored = f"./{copy.relative_to(place.folder)}"
    assert script("query", "select file from record_files", "--json").json == [{"file": stored}]
    assert {path.name for path in place.output.iterdir()} == {"run-000001", "run-000002"}


def test_a_copy_whose_run_is_on_record_stays(
    script: Script, place: Place, small_model: Path
) -> None:
    """A kill after the commit, and before the copy has lost its temporary name."""
    left = killed_in_create_run(place, small_model, "lib.ledger.runs.drop_names", after=False)
    assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 0
    assert kept(place) == [left]
    assert {path.name for path in place.output.iterdir()} == {"run-000001", "run-000002"}
    assert script("resume", "--run", "1").status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_a_copy_that_another_database_lists_stays(
    script: Script, place: Place, small_model: Path
) -> None:
    left = killed_in_create_run(place, small_model, "lib.ledger.runs.drop_names", after=False)
    other = ["--database", place.folder / "other.sqlite"]
    assert script("embed", *embed(small_model, SOME_PROTEINS), *other).status == 0
    assert kept(place) == [left]
    assert script("resume", "--run", "1").status == 0


def test_no_name_is_taken_from_another_file(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, feed: Feed
) -> None:
    monkeypatch.setattr("lib.ledger.runs.uuid.uuid4", lambda: UUID(int=0))
    there = place.output / "run-000001" / ".stdin-00000000.fasta"
    with monkeypatch.context() as failing:  # a start that dies and leaves the folder
        failing.setattr("lib.ledger.runs.model_row", fail)
        assert script("embed", *embed(small_model, SOME_PROTEINS)).status == 4
    there.write_text("somebody's")
    feed(SOME_PROTEINS)
    answer = script("embed", *embed(small_model))
    assert (answer.status, answer.error) == (4, f"{there}: exists already")
    assert there.read_text() == "somebody's"
    assert script("history", "--json").json == []


def test_a_name_lost_to_another_process_is_made_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making and locking its file, another process may take it for a leftover."""
    lock = fcntl.flock
    locked: list[int] = []

    def removed_first(file: int, how: int) -> None:
        if not locked:
            next(place.folder.glob(".stdin-*")).unlink()
        locked.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    path, file = standard_input._new_file(place.folder)
    with file:
        assert len(locked) == 2
        assert path.samefile(f"/dev/fd/{file.fileno()}")


def test_the_settings_on_record_say_what_was_asked_for(
    script: Script, place: Place, small_model: Path, feed: Feed
) -> None:
    feed(SOME_PROTEINS)
    assert script("embed", *embed(small_model)).status == 0
    asked = "select settings ->> '$.input.fasta[0]' as said from runs"
    assert script("query", asked, "--json").json == [{"said": "-"}]
    sql(place, "UPDATE runs SET status = 'running'")
    assert script("resume").status == 0
    assert len(fasta(kept(place)[0])) == 15
