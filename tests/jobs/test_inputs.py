"""Several inputs: if these fail, records of files get mixed up, or a changed file goes unseen."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.embeddings import open_run
from lib.ledger.footer import read_footer
from lib.sequences import inventory as inventories
from lib.sequences.inputs import combined_sha256
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script
from tests.jobs.test_identity import sql
from tests.reference import assert_same_bits, fasta, read_run, write_fasta

QUICK = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
FIRSTS = [0, 4, 9]


@pytest.fixture
def files(place: Place) -> list[Path]:
    """Fifteen proteins in three files, the second compressed."""
    entries = fasta(SOME_PROTEINS)
    one = write_fasta(place.folder / "one.fasta", entries[:4])
    plain = write_fasta(place.folder / "plain", entries[4:9])
    two = place.folder / "two of them.fasta.gz"
    two.write_bytes(gzip.compress(plain.read_bytes()))
    return [one, two, write_fasta(place.folder / "three.faa", entries[9:])]


def embed(model: Path, files: list[Path], *more: str) -> list[str | Path]:
    return ["--esm-model", model, "--input", *files, *QUICK, *more]


@pytest.fixture
def run(script: Script, small_model: Path, files: list[Path]) -> int:
    """The number of a finished run of the three files."""
    answer = script("embed", *embed(small_model, files), "--json")
    assert answer.status == 0, answer.err
    assert answer.json["inputs"] == [str(file) for file in files]
    return int(answer.json["run"])


# ---- One run of several files


def test_several_files_are_embedded_as_if_they_were_one(
    script: Script, place: Place, small_model: Path, run: int
) -> None:
    assert script("embed", *embed(small_model, [SOME_PROTEINS])).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_the_database_has_every_file_and_its_records(
    script: Script, place: Place, run: int, files: list[Path]
) -> None:
    found = script("query", "select * from record_files", "--json").json
    assert [place.folder / one["file"] for one in found] == files
    assert [one["first_record"] for one in found] == FIRSTS
    assert [one["last_record"] for one in found] == [3, 8, 14]
    assert [one["bytes"] for one in found] == [file.stat().st_size for file in files]
    (row,) = script("query", "select * from runs", "--json").json
    assert row["input_path"] == f"./{files[0].name}"
    assert row["input_bytes"] == sum(file.stat().st_size for file in files)
    assert row["input_sha256"] == combined_sha256([one["sha256"] for one in found])
    assert row["input_sha256"] not in [one["sha256"] for one in found]
    footer = read_footer(place.output / "run-000001" / "checkpoint-000001.parquet")
    assert footer["identity"]["input_sha256"] == row["input_sha256"]
    assert [Path(one["path"]) for one in footer["inputs"]] == files
    assert [one["first_record"] for one in footer["inputs"]] == FIRSTS


def test_one_file_is_recorded_as_ever(script: Script, small_model: Path) -> None:
    assert script("embed", *embed(small_model, [SOME_PROTEINS])).status == 0
    (row,) = script("query", "select * from runs", "--json").json
    (file,) = script("query", "select * from record_files", "--json").json
    assert row["input_path"] == file["file"] == str(SOME_PROTEINS)
    assert row["input_sha256"] == file["sha256"]
    assert "inputs\n" not in script("history", "--run", "1").out


def test_the_history_shows_every_file(script: Script, run: int, files: list[Path]) -> None:
    shown = script("history", "--run", "1").out
    assert f"{files[0]} and 2 more" in shown
    table = shown.split("\ninputs\n")[1].split("\n\n")[0].splitlines()
    assert [str(file) in line for file, line in zip(files, table[1:], strict=True)] == [True] * 3
    detail = script("history", "--run", "1", "--json").json
    assert [one["file"] for one in detail["inputs"]] == [str(file) for file in files]
    assert "one.fasta and 2 more" in script("history").out


def test_the_report_shows_every_file(
    script: Script, place: Place, run: int, files: list[Path]
) -> None:
    assert script("report", "--run", "1", "--to", place.folder / "r.html").status == 0
    page = (place.folder / "r.html").read_text()
    section = page.split("<h2>Input files</h2>")[1].split("</section>")[0]
    assert re.findall(r'data-name="file"><bdi>(.*?)</bdi>', section) == [str(one) for one in files]


def test_a_program_learns_the_file_of_every_record(
    place: Place, run: int, files: list[Path]
) -> None:
    opened = open_run(place.database, 1)
    expected = [str(file) for file, records in zip(files, [4, 5, 6], strict=True)
                for _ in range(records)]  # fmt: skip
    assert opened.input_files == expected
    assert [one["first_record"] for one in opened.inputs] == FIRSTS


def test_exports_name_the_files(script: Script, place: Place, run: int, files: list[Path]) -> None:
    for form in ("hdf5", "npy", "esm-extract", "virnucpro", "anndata"):
        to = place.folder / f"to-{form}"
        assert script("export", "--run", "1", "--format", form, "--to", to).status == 0
    facts = json.loads((place.folder / "to-npy" / "run.json").read_text())
    assert facts["inputs"]["path"] == [str(file) for file in files]
    assert facts["inputs"]["first_record"] == FIRSTS
    import anndata  # with zarr, a second that few tests need

    read = anndata.read_h5ad(place.folder / "to-anndata")
    assert list(read.obs["input_file"]) == open_run(place.database, 1).input_files
    assert list(read.uns["esm_ledger"]["inputs"]["records"]) == [4, 5, 6]


def test_such_a_run_is_validated_and_verified(script: Script, run: int) -> None:
    answer = script("validate", "--run", "1")
    assert (answer.status, "identity good" in answer.out) == (0, True), answer.out
    answer = script("verify", "--run", "1", "--sample", "15", "--json")
    assert answer.status == 0, answer.err
    assert answer.json["records"] == list(range(15))


def test_validate_takes_several_files(script: Script, small_model: Path, files: list[Path]) -> None:
    answer = script("validate", "--esm-model", small_model, "--input", *files)
    assert answer.status == 0
    assert f"input {files[0]} and 2 more: 15 records, 15 different" in answer.out


# ---- What is refused: docs/input.md, row by row

ONE, TWO = ">b one\nMKTAY\n>a\nGG\n", ">c\nMKT\n>d\nG\n"
SECOND: dict[str, str | bytes | None] = {
    "two files, one of them compressed": gzip.compress(TWO.encode()),
    "an id that appears in both": ">c\nMKT\n>b\nGA\n",
    "an id that appears twice in the second": ">x\nMKT\n>x\nGA\n",
    "a fault in a record of the second": ">c\nMKT\n>d\nG6\n",
    "a second file without records": "\n",
    "a second file that is not FASTA": "MKTAY\n",
    "a second file that is not there": None,
    "a second file that changes between preflight and embedding": TWO,
}
ROWS = [
    tuple(cell.strip() for cell in line.split("|")[1:4])
    for line in (ROOT / "docs/input.md").read_text().split("## Several files")[1].splitlines()
    if line.startswith("| ") and not line.startswith("| input ")
]


def test_every_row_of_the_page_is_tried() -> None:
    assert [row[0] for row in ROWS] == list(SECOND)


@pytest.mark.parametrize(("what", "happens", "status"), ROWS, ids=[row[0] for row in ROWS])
def test_several_files_get_what_the_page_says(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    happens: str,
    status: str,
) -> None:
    one, two = place.folder / "one.fasta", place.folder / "two.fasta"
    content = SECOND[what]
    one.write_text(ONE)
    if content is not None:
        two.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "changes" in what:
        preflight = inventories.preflight

        def preflight_then_change(*args: Any, **named: Any) -> inventories.Inventory:  # noqa: ANN401
            inventory = preflight(*args, **named)
            two.write_text(TWO.replace("MKT", "MKV"))
            return inventory

        monkeypatch.setattr("scripts.embed.preflight", preflight_then_change)
    answer = script("embed", "--esm-model", small_model, "--input", one, "--input", two)
    assert answer.status == int(status), answer.err
    if answer.status:
        expected = re.findall(r"`(.+?)`", happens)[0]
        assert answer.error.replace(str(one), "ONE").replace(str(two), "TWO") == expected
    else:
        rows: dict[int, Any] = read_run(place.output / "run-000001")
        assert [rows[i]["id"] for i in range(4)] == ["b", "a", "c", "d"]


def test_ids_may_repeat_in_other_files_if_asked(
    script: Script, place: Place, small_model: Path
) -> None:
    one = write_fasta(place.folder / "one.fasta", [("a", "MKTAY"), ("b", "GG")])
    keep = ["--set", "input.duplicate_ids=keep"]
    assert script("embed", "--esm-model", small_model, "--input", one, one, *keep).status == 0
    rows: dict[int, Any] = read_run(place.output / "run-000001")
    assert [rows[i]["id"] for i in range(4)] == ["a", "b", "a", "b"]
    assert np.array_equal(rows[0]["mean_2"], rows[2]["mean_2"])


# ---- Resumed


def killed(place: Place, *flags: str | Path) -> None:
    """Embed, and die after the second checkpoint."""
    dying = partial(
        processes.at_call, "lib.ledger.commit.add_checkpoint", 2, processes.die, after=True
    )
    done = processes.run("embed", *flags, "--config", place.config, prepare=dying)
    assert done.status == -signal.SIGKILL, done.err


@pytest.fixture
def half(script: Script, place: Place, small_model: Path, files: list[Path]) -> Iterator[None]:
    """Run 1 of the three files, killed after two checkpoints."""
    killed(place, *embed(small_model, files))
    yield
    assert script("resume", "--run", "1").status == 0
    assert script("embed", *embed(small_model, [SOME_PROTEINS])).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


@pytest.mark.usefixtures("half")
def test_a_killed_run_of_several_files_is_resumed_with_the_same_bits() -> None:
    """The fixture resumes and compares; so do the tests below, after their attack is undone."""


def refused(script: Script, status: int, fact: str, *flags: str | Path) -> None:
    for name in ("resume", "validate"):
        answer = script(name, "--run", "1", *flags)
        assert answer.status == status, (name, answer.out, answer.err)
        assert (answer.out or answer.error).strip() == fact, name


def digests(script: Script) -> list[str]:
    rows = script("query", "select sha256 from record_files", "--json").json
    return [row["sha256"] for row in rows]


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("content", [None, "MKTAY\n", ">a\nM6\n"], ids=["good", "no", "faulty"])
def test_a_file_that_has_changed_is_refused(
    script: Script, files: list[Path], content: str | None
) -> None:
    before = files[2].read_text()
    files[2].write_text(before + "; a comment\n" if content is None else content)
    answer = script("validate", "--run", "1")
    sha256 = digests(script)[2]
    assert answer.status == 3
    start = f"run 1: sha256 of input file 2 is {sha256} in the run, "
    assert answer.out.startswith(start)
    assert answer.out.endswith(f" in {files[2]}\n")
    refused(script, 3, answer.out.strip())
    files[2].write_text(before)


@pytest.mark.usefixtures("half")
def test_files_in_another_order_are_refused(script: Script, files: list[Path]) -> None:
    one, two, _ = digests(script)
    fact = f"run 1: sha256 of input file 0 is {one} in the run, {two} in {files[1]}"
    refused(script, 3, fact, "--input", files[1], files[0], files[2])


@pytest.mark.usefixtures("half")
def test_fewer_or_more_files_are_refused(script: Script, files: list[Path]) -> None:
    refused(
        script, 3, f"run 1: 3 files in the input of the run, 2 in {files[0]} and 1 more",
        "--input", *files[:2],
    )  # fmt: skip
    refused(
        script, 3, f"run 1: 3 files in the input of the run, 1 in {SOME_PROTEINS}",
        "--input", SOME_PROTEINS,
    )  # fmt: skip


@pytest.mark.usefixtures("half")
def test_a_missing_file_is_named_and_may_lie_elsewhere(script: Script, files: list[Path]) -> None:
    moved = files[1].rename(files[1].with_name("moved.gz"))
    refused(script, 2, f"{files[1]}: no such file")
    answer = script("validate", "--run", "1", "--input", files[0], moved, files[2])
    assert answer.status == 0, answer.out
    moved.rename(files[1])


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize(
    "change",
    [
        "records = records + 1 WHERE number = 1",
        "first_record = 5 WHERE number = 1",
        "number = 7 WHERE number = 2",
        "sha256 = 'x' WHERE number = 0",
    ],
)
def test_rows_of_inputs_that_were_changed_are_refused(
    script: Script, place: Place, change: str
) -> None:
    kept = shutil.copy(place.database, place.folder / "kept")
    sql(place, f"UPDATE inputs SET {change}")
    fact = "run 1: its rows in inputs do not make its input_sha256 and records_total"
    for name in ("resume", "validate"):
        answer = script(name, "--run", "1")
        assert answer.status == 3
        assert fact in (answer.out or answer.error)
    for path in place.folder.glob("runs.sqlite*"):
        path.unlink()
    shutil.move(kept, place.database)


# ---- A folder


def test_a_folder_is_its_fasta_files_by_name(
    script: Script, place: Place, small_model: Path
) -> None:
    folder = place.folder / "some proteomes"
    (folder / "sub.fasta").mkdir(parents=True)
    names = ["10.fa", "9.faa", "B.FASTA", "a.fas", "b.pep.xz", "c.fa.gz"]
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    for name in reversed(names):
        content = f">of-{name}\nMKTAY\n".encode()
        (folder / name).write_bytes(compress.get(Path(name).suffix, bytes)(content))
    for other in (".hidden.fasta", "notes.txt", "genes.fna", "fasta", "a.fasta.bak"):
        (folder / other).write_text("not read")
    answer = script("embed", "--esm-model", small_model, "--input", folder)
    assert answer.status == 0, answer.err
    rows: dict[int, Any] = read_run(place.output / "run-000001")
    assert [rows[i]["id"] for i in range(6)] == [f"of-{name}" for name in names]
    found = script("query", "select file from record_files", "--json").json
    assert [one["file"] for one in found] == [f"./some proteomes/{name}" for name in names]


def test_a_folder_that_has_grown_continues_its_run(
    script: Script, place: Place, small_model: Path, files: list[Path]
) -> None:
    folder = place.folder / "proteomes"
    folder.mkdir()
    for number, file in enumerate(files):
        file.rename(folder / f"{number}-{file.name}")
    killed(place, "--esm-model", small_model, "--input", folder, *QUICK)
    write_fasta(folder / "0.fasta", [("new", "MKTAY")])
    fact = "run 1: 3 files in the input of the run, 4 in "
    assert script("resume", "--input", folder).error.startswith(fact)
    assert script("resume").status == 0
    assert script("embed", *embed(small_model, [SOME_PROTEINS])).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_a_folder_without_fasta_is_refused(script: Script, small_model: Path, place: Place) -> None:
    (place.folder / "none" / "sub").mkdir(parents=True)
    write_fasta(place.folder / "none" / "sub" / "a.fasta", [("a", "MK")])
    answer = script("embed", "--esm-model", small_model, "--input", place.folder / "none")
    fact = "no FASTA file in this folder (.fasta .fa .faa .fas .pep)"
    assert (answer.status, answer.error) == (2, f"{place.folder / 'none'}: {fact}")


def test_a_folder_stands_among_files(
    script: Script, place: Place, small_model: Path, files: list[Path]
) -> None:
    (place.folder / "inner").mkdir()
    inner = files[1].rename(place.folder / "inner" / files[1].name)
    mixed = [files[0], inner.parent, files[2]]
    assert script("embed", *embed(small_model, mixed)).status == 0
    found = script("query", "select file from record_files", "--json").json
    assert [place.folder / one["file"] for one in found] == [files[0], inner, files[2]]


def test_a_checkpoint_of_several_files_is_adopted(
    script: Script, place: Place, small_model: Path, files: list[Path]
) -> None:
    dying = partial(processes.at_call, "lib.ledger.commit.rename_into_place", 2, processes.die,
                    after=True)  # fmt: skip
    flags = [*embed(small_model, files), "--config", place.config]
    assert processes.run("embed", *flags, prepare=dying).status == -signal.SIGKILL
    answer = script("resume")
    assert "checkpoint-000002.parquet: not in the database, verified and adopted" in answer.err
    assert pq.read_table(place.output / "run-000001").num_rows == 15
