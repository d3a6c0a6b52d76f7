"""Disk: if this fails, a full or vanished disk costs more than what was not yet committed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import SOME_PROTEINS, UNIPROT_PART, Answer, Place, Script
from tests.processes import Work
from tests.reference import assert_same_bits

ADD = "lib.ledger.commit.add_checkpoint"


def move_away(folder: Path) -> None:
    shutil.move(folder, f"{folder}.moved")


def fill_disk(filler: Path) -> None:
    filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free))


def after_two_checkpoints(do: Work, *flags: object) -> Answer:
    """Run embed.py, and do something after its second checkpoint."""
    return processes.run(
        "embed", *flags, prepare=partial(processes.at_call, ADD, 2, do, after=True)
    )


def embed_flags(model: Path) -> list[str | Path]:
    small = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
    return ["--esm-model", model, "--input", SOME_PROTEINS, "--include", "mean", "per_tok", *small]


@pytest.fixture
def reference(script: Script, place: Place, small_model: Path, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run, made elsewhere."""
    folder = tmp_path / "reference"
    flags = [*embed_flags(small_model), "--output", folder, "--database", tmp_path / "other.sqlite"]
    assert script("embed", *flags).status == 0
    return folder / "run-000001"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this process may mount one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode != 0:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def attempts(script: Script) -> list[str]:
    detail = script("history", "--run", "1", "--json").json
    return [one["outcome"] for one in detail["attempts"]]


def test_a_quota_reached_is_one_line_and_the_run_goes_on_when_it_is_lifted(
    script: Script, place: Place, small_model: Path, reference: Path
) -> None:
    flags = [*embed_flags(small_model), "--config", place.config]
    largest = max(path.stat().st_size for path in reference.glob("checkpoint-*"))
    # Less by what two files of one content differ in: the digits of the seconds in their footers.
    answer = processes.run("embed", *flags, prepare=partial(processes.limit_files, largest - 100))
    assert answer.status == 4
    assert answer.error.endswith(".attempt-1-0.parquet.tmp: File too large")
    assert attempts(script) == ["failed"]
    assert [path.name for path in (place.output / "run-000001").iterdir()] == [".lock"]
    assert script("resume").status == 0
    assert_same_bits(place.output / "run-000001", reference)


@pytest.mark.parametrize("size", [100, 98_000])
def test_a_quota_reached_by_the_database_is_one_line_and_loses_nothing(
    script: Script, place: Place, small_model: Path, size: int
) -> None:
    # As its first page is written, and when some checkpoints are committed.
    embed = ["--esm-model", small_model, "--input", UNIPROT_PART, "--config", place.config]
    embed += ["--set", "output.checkpoint_records=1", "--set", "compute.tokens_per_pack=10"]
    answer = processes.run("embed", *embed, prepare=partial(processes.limit_files, size))
    assert answer.status == 4
    assert answer.error == f"database {place.database}: disk I/O error (SQLITE_IOERR_WRITE)"
    history = script("history", "--json")
    shown = history.json if history.status == 0 else []
    assert bool(shown) == (size > 100)
    if shown:
        assert 0 < shown[0]["records_done"] < shown[0]["records_total"]
        assert script("resume").status == 0
    elsewhere = ["--output", place.folder / "other"]
    assert script("embed", *embed, *elsewhere).status == 0
    if shown:
        other = place.folder / "other" / "run-000002"
        assert_same_bits(place.output / "run-000001", other)


def test_a_full_disk_keeps_what_is_committed_and_goes_on_when_there_is_room(
    script: Script, place: Place, small_model: Path, reference: Path, small_disk: Path
) -> None:
    largest = max(path.stat().st_size for path in reference.glob("checkpoint-*"))
    total = sum(path.stat().st_size for path in reference.glob("checkpoint-*"))
    filler = small_disk / "filler"
    # Room for the first checkpoint and not for all.
    filler.write_bytes(bytes((1 << 20) - (total + largest) // 2))
    answer = script("embed", *embed_flags(small_model), "--output", small_disk / "out")
    assert answer.status == 4
    assert "No space left on device" in answer.error
    detail = script("history", "--run", "1", "--json").json
    assert detail["status"] == "failed"
    assert len(detail["checkpoints"]) >= 1
    folder = small_disk / "out" / "run-000001"
    assert {path.name for path in folder.iterdir()} == {
        ".lock", *(one["path"] for one in detail["checkpoints"])
    }  # fmt: skip
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert script("resume").status == 0
    assert_same_bits(folder, reference)


def test_no_byte_free_for_the_database_loses_nothing_committed(
    script: Script, place: Place, small_model: Path, small_disk: Path
) -> None:
    # So many checkpoints that the database needs further pages.
    flags = ["--esm-model", small_model, "--input", UNIPROT_PART]
    flags += ["--set", "output.checkpoint_records=1", "--set", "compute.tokens_per_pack=10"]
    assert script("embed", *flags, "--output", place.folder / "reference").status == 0
    flags += ["--database", small_disk / "runs.sqlite"]
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1 << 20) - 4096))
    refused = script("embed", *flags)
    assert refused.status == 4
    assert refused.error.startswith(f"database {small_disk / 'runs.sqlite'}: ")
    filler.unlink()
    assert script("history", "--database", small_disk / "runs.sqlite").status in (0, 2)
    filling = partial(fill_disk, filler)
    answer = after_two_checkpoints(filling, *flags, "--config", place.config)
    assert answer.status == 4
    assert answer.error.startswith(f"database {small_disk / 'runs.sqlite'}: ")
    filler.unlink()
    resume = ["--run", "1", "--database", small_disk / "runs.sqlite"]
    shown = script("history", *resume, "--json").json
    assert len(shown["checkpoints"]) >= 2
    assert script("resume", *resume).status == 0
    assert_same_bits(place.output / "run-000001", place.folder / "reference" / "run-000001")


@pytest.mark.parametrize("what", ["embeddings", "embeddings/run-000001"])
def test_a_folder_that_vanishes_is_one_line_and_the_run_goes_on_when_it_is_back(
    script: Script, place: Place, small_model: Path, reference: Path, what: str
) -> None:
    folder = place.folder / what
    flags = [*embed_flags(small_model), "--config", place.config]
    answer = after_two_checkpoints(partial(move_away, folder), *flags)
    assert answer.status == 4
    assert answer.error.endswith("No such file or directory")
    assert attempts(script) == ["failed"]
    moved = Path(f"{folder}.moved")
    gone = script("resume")
    assert gone.status == 4
    assert "no such folder" in gone.error
    moved.rename(folder)
    assert script("resume").status == 0
    assert_same_bits(place.output / "run-000001", place.folder / "reference" / "run-000001")


def test_a_read_only_disk_is_one_line(script: Script, small_model: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    flags = embed_flags(small_model)
    answer = script("embed", *flags, "--output", small_disk / "out")
    assert answer.status == 4
    assert answer.error == f"{small_disk / 'out' / 'run-000001'}: Read-only file system"
    assert script("history", "--json").json == []
    database = small_disk / "runs.sqlite"
    answer = script("embed", *flags, "--database", database)
    assert answer.status == 4
    assert answer.error.startswith(f"database {database}: ")


def test_output_on_another_device_than_the_folder_for_temporary_files(
    script: Script, small_model: Path, reference: Path, tmp_path: Path
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other device than the temporary folder")
    folder = other / f"esm_ledger_{os.getpid()}"
    try:
        assert script("embed", *embed_flags(small_model), "--output", folder).status == 0
        assert_same_bits(folder / "run-000001", reference)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_backup_to_a_full_disk_names_its_file(
    script: Script, place: Place, small_model: Path, small_disk: Path
) -> None:
    assert script("embed", *embed_flags(small_model)).status == 0
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 8192))
    to = small_disk / "backup.sqlite"
    answer = script("backup", "--to", to)
    assert (answer.status, answer.error) == (4, f"{to}: database or disk is full")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
