"""Adoption: if these fail, finished work is deleted, or a stranger's file is taken for a run's.

A database that was restored from an older copy knows nothing of what was committed since.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schema.parquet import FOOTER_KEY
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.jobs.test_resume import killed_at
from tests.reference import assert_same_bits

QUICK = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]


def flags(model: Path) -> list[str | Path]:
    return ["--esm-model", model, "--input", SOME_PROTEINS, "--include", "mean", "per_tok", *QUICK]


@pytest.fixture
def restored(script: Script, place: Place, small_model: Path) -> Path:
    """Return the folder of a finished run whose database knows its first checkpoint only."""
    commit = "lib.ledger.commit.add_checkpoint"
    killed_at(place, (commit, "after", 1), "embed", *flags(small_model))
    backup = place.folder / "backup.sqlite"
    assert script("backup", "--to", backup).status == 0
    assert script("resume").status == 0
    for part in ("", "-wal", "-shm"):
        Path(f"{place.database}{part}").unlink(missing_ok=True)
    shutil.copy(backup, place.database)
    return place.output / "run-000001"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("checkpoint-*.parquet")}


def test_what_was_committed_after_a_backup_is_adopted(
    script: Script, place: Place, small_model: Path, restored: Path
) -> None:
    before = contents(restored)
    assert len(before) > 2
    answer = script("resume")
    assert answer.status == 0, answer.err
    for name in sorted(before)[1:]:
        assert f"run 1: {name}: not in the database, verified and adopted" in answer.err
    assert contents(restored) == before
    assert script("validate", "--run", "1").status == 0
    assert script("embed", *flags(small_model)).status == 0
    assert_same_bits(restored, place.output / "run-000002")


def altered_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # within the vectors
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def written_again(path: Path, table: pa.Table) -> None:
    """Write a table in a file's place, under its footer and with all checksums good."""
    footer = pq.read_metadata(path).metadata[FOOTER_KEY]
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_KEY: footer})


def with_other_records(path: Path) -> None:
    table = pq.read_table(path)
    numbers = table.column("record").to_pylist()
    numbers[0], numbers[1] = numbers[1], numbers[0]
    column = pa.array(numbers, pa.int64())
    written_again(path, table.set_column(0, table.schema.field("record"), column))


def with_other_columns(path: Path) -> None:
    table = pq.read_table(path)
    number = table.column_names.index("mean_2")
    written_again(path, table.set_column(number, "other", table.column(number)))


def linked(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere.parquet"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def with_a_row_less(path: Path) -> None:
    written_again(path, pq.read_table(path).slice(1))


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (altered_page, "CRC checksum"),
        (truncated, "Parquet magic bytes not found"),
        (with_other_records, "its records are not those of its positions"),
        (with_a_row_less, "its records are not those of its positions"),
        (with_other_columns, "its columns are not those of the run"),
        (linked, "not a regular file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_does_not_verify_is_kept_aside_and_computed_again(
    script: Script,
    place: Place,
    small_model: Path,
    restored: Path,
    spoil: Callable[[Path], None],
    fact: str,
) -> None:
    path = restored / "checkpoint-000002.parquet"
    spoil(path)
    spoilt = path.read_bytes()
    answer = script("resume")
    assert answer.status == 0, answer.err
    kept = f".{path.name}.kept-1"
    said = next(line for line in answer.err.splitlines() if "kept as" in line)
    assert said.startswith(f"run 1: {path.name}: not in the database, kept as {kept}: ")
    assert fact in said
    assert (restored / kept).read_bytes() == spoilt
    assert script("validate", "--run", "1").status == 0
    assert script("embed", *flags(small_model)).status == 0
    assert_same_bits(restored, place.output / "run-000002")


def test_a_file_whose_positions_are_listed_is_kept_aside(script: Script, restored: Path) -> None:
    shutil.copy(restored / "checkpoint-000001.parquet", restored / "checkpoint-000099.parquet")
    answer = script("resume")
    assert answer.status == 0, answer.err
    assert "kept as .checkpoint-000099.parquet.kept-1: checkpoint-000001.parquet has" in answer.err
    assert script("validate", "--run", "1").status == 0


def test_a_temporary_file_of_an_attempt_that_the_database_does_not_know_is_left_alone(
    script: Script, restored: Path
) -> None:
    theirs = restored / ".attempt-99-0.parquet.tmp"
    theirs.write_bytes(b"being written")
    old = restored / ".attempt-1-7.parquet.tmp"
    old.write_bytes(b"given up")
    answer = script("resume")
    assert answer.status == 0, answer.err
    assert theirs.read_bytes() == b"being written"
    assert f"{theirs.name}: of an attempt that the database does not know, left alone" in answer.err
    assert not old.exists()


def test_a_finished_run_that_lacks_a_row_is_named_and_completed(
    script: Script, place: Place, small_model: Path
) -> None:
    for _ in range(2):
        assert script("embed", *flags(small_model)).status == 0
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute("DELETE FROM checkpoints WHERE run_id = 1 AND first_position = 3")
    found = script("validate", "--run", "1")
    assert found.status == 3
    assert "finished, but no checkpoint has positions 3 to" in found.out
    (place.output / "run-000001" / "checkpoint-000002.parquet").unlink()
    assert script("resume", "--run", "1").status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")
    assert script("validate", "--run", "1").status == 0


def test_a_finished_run_whose_records_do_not_add_up_is_refused(
    script: Script, place: Place, small_model: Path
) -> None:
    assert script("embed", *flags(small_model)).status == 0
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute("UPDATE checkpoints SET records = records - 1 WHERE first_position = 0")
    for name in ("validate", "resume"):
        answer = script(name, "--run", "1")
        assert answer.status == 3
        assert "records is 2 in the database, 3 in the file's footer" in answer.out + answer.err
