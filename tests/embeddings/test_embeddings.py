"""Runs read back in Python: if this fails, vectors stand beside the wrong ids."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.embeddings import RunEmbeddings, open_run
from lib.embeddings import export as exports
from lib.errors import IdentityRefusedError, SettingsError
from lib.files import file_sha256
from lib.ledger.database import open_for_writing, transaction
from schema.parquet import FOOTER_KEY
from tests.conftest import ROOT, SOME_PROTEINS, Once, Place, Script
from tests.reference import fasta, read_run, write_fasta

Runs = tuple[RunEmbeddings, Path]


@pytest.fixture
def embedded(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, once: Once
) -> Runs:
    """A run of five windows and many files; later windows repeat sequences of earlier ones."""
    monkeypatch.setattr("lib.sequences.inventory.WINDOW_RECORDS", 5)

    def embed() -> None:
        entries = fasta(SOME_PROTEINS)
        entries += [(f"again{i} of {i}", entries[i][1]) for i in (7, 0, 3)]
        source = write_fasta(place.folder / "repeated.fasta", entries)
        place.set("output", "checkpoint_records", 2)
        place.set("output", "per_tok_dtype", "float16")
        place.set("compute", "tokens_per_pack", 300)
        answer = script(
            "embed", "--esm-model", small_model, "--input", source,
            "--include", "mean", "bos", "per_tok", "--repr-layers", "0", "-1",
        )  # fmt: skip
        assert answer.status == 0, answer.err

    once(embed)
    folder = place.output / "run-000001"
    assert len(list(folder.glob("*.parquet"))) > 4
    return open_run(place.database, 1, verify=True), folder


def test_ids_and_matrices_stand_in_the_order_of_the_file(embedded: Runs) -> None:
    run, folder = embedded
    rows = read_run(folder)
    stored_order = pq.read_table(folder)["record"].to_pylist()
    assert stored_order != sorted(stored_order)
    assert len(run) == 18
    assert run.records.tolist() == list(range(18))
    assert run.ids == [rows[i]["id"] for i in range(18)]
    assert run.ids[:2] == [header.split()[0] for header, _ in fasta(SOME_PROTEINS)[:2]]
    lengths = run.table("length", "description")
    assert lengths["length"].to_pylist() == [rows[i]["length"] for i in range(18)]
    # Arrow's string would end at 2 GB of texts, of which a run may have more.
    assert lengths.schema.types == [pa.int32(), pa.large_string()]
    for kind in ("mean", "bos"):
        for layer, column in ((0, f"{kind}_0"), (None, f"{kind}_2"), (-1, f"{kind}_2")):
            matrix = run.matrix(kind, layer)
            assert matrix.dtype == np.float32
            assert matrix.tobytes() == np.stack([rows[i][column] for i in range(18)]).tobytes()


def test_files_are_read_in_the_main_thread(
    embedded: Runs, place: Place, reading_threads: set[int]
) -> None:
    """A thread of Arrow that called the file when the process ended aborted it, at times."""
    run = open_run(place.database, 1)
    run.matrix()
    run.residues(0)
    assert reading_threads == {threading.get_native_id()}


def test_a_matrix_on_disk_is_the_one_in_memory_and_replaces_nothing(
    embedded: Runs, tmp_path: Path
) -> None:
    run, _folder = embedded
    mapped = run.matrix("bos", 0, to=tmp_path / "bos.npy")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, run.matrix("bos", 0))
    with pytest.raises(SettingsError, match=r"bos\.npy: exists already"):
        run.matrix("mean", 0, to=tmp_path / "bos.npy")
    assert np.array_equal(np.load(tmp_path / "bos.npy"), mapped)


def test_residues_of_one_record(embedded: Runs) -> None:
    run, folder = embedded
    rows = read_run(folder)
    for record in (0, 4, 9, 17):
        found = run.residues(record, 0)
        assert found.dtype == np.float16
        assert found.shape == (rows[record]["embedded_length"], 64)
        expected = rows[record]["per_tok_0"]
        assert isinstance(expected, np.ndarray)
        assert found.astype(np.float32).tobytes() == expected.tobytes()
    with pytest.raises(SettingsError, match="run 1: no record 18"):
        run.residues(18)


def test_what_was_not_kept_is_refused(embedded: Runs) -> None:
    run, _folder = embedded
    with pytest.raises(SettingsError, match="run 1: layer 1 is not kept, only 0 2"):
        run.matrix(layer=1)
    with pytest.raises(SettingsError, match="kind per_tok: not mean or bos"):
        run.matrix("per_tok")


def test_an_unfinished_run_is_refused_unless_partial(embedded: Runs, place: Place) -> None:
    _run, folder = embedded
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        change = session.connection().exec_driver_sql
        change("UPDATE runs SET status = 'interrupted'")
        change("DELETE FROM checkpoints WHERE first_position = 0")
    left = len(read_run(folder)) - pq.read_metadata(folder / "checkpoint-000001.parquet").num_rows
    with pytest.raises(SettingsError, match=f"run 1: interrupted, {left} of 18 records done"):
        open_run(place.database, 1)
    part = open_run(place.database, 1, partial=True)
    rows = read_run(folder)
    assert len(part) == left < 18
    assert part.ids == [rows[i]["id"] for i in part.records.tolist()]
    expected = np.stack([rows[i]["mean_2"] for i in part.records.tolist()])
    assert part.matrix().tobytes() == expected.tobytes()


def test_files_that_are_not_what_the_database_lists_are_refused(
    embedded: Runs, place: Place
) -> None:
    _run, folder = embedded
    first, second = folder / "checkpoint-000001.parquet", folder / "checkpoint-000002.parquet"
    content = first.read_bytes()
    first.write_bytes(content + b"more")
    with pytest.raises(IdentityRefusedError, match=r"bytes, \d+ in the database"):
        open_run(place.database, 1)
    # One byte of a vector: the size is the same, the digest and the page's checksum are not.
    first.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    with pytest.raises(IdentityRefusedError, match="sha256 differs from the database"):
        open_run(place.database, 1, verify=True)
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(IdentityRefusedError, match="no such regular file"):
        open_run(place.database, 1)


# Bytes of a footer in which one bit is flipped: (pattern, place of the byte in it, bit).
FLIPS = {
    "FLOAT becomes BOOLEAN": (b"\x15\x08\x25\x02\x18\x07element", 1, 8),
    "mean_2 is called something else": (b"\x18\x06mean_2", 7, 1),
    "ids are bytes": (b"\x18\x02id\x25\x00\x4c\x1c", 7, 8),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flipped_bit_in_a_footer_is_refused(embedded: Runs, place: Place, flip: str) -> None:
    """Vectors of 0 and 1 used to be read, and ids that are bytes."""
    file = embedded[1] / "checkpoint-000001.parquet"
    content, (pattern, offset, bit) = bytearray(file.read_bytes()), FLIPS[flip]
    content[content.rindex(pattern) + offset] ^= bit
    file.write_bytes(content)
    with pytest.raises(IdentityRefusedError, match=f"{file}: its columns are not those of the run"):
        open_run(place.database, 1)


def test_a_footer_with_other_records_than_the_database_is_refused(
    embedded: Runs, place: Place
) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql("UPDATE checkpoints SET records = records + 1")
    with pytest.raises(IdentityRefusedError, match=r"parquet: \d records, \d in the database$"):
        open_run(place.database, 1)


def test_a_page_that_is_not_what_its_checksum_says_is_refused(
    embedded: Runs, place: Place, script: Script
) -> None:
    """It used to be told as a failure of the disk."""
    file = embedded[1] / "checkpoint-000001.parquet"
    content, parquet = bytearray(file.read_bytes()), pq.ParquetFile(file)
    columns = parquet.metadata.row_group(0)
    number = parquet.schema_arrow.names.index("mean_2")
    place_of = columns.column(number)
    assert place_of.path_in_schema.startswith("mean_2")
    end = place_of.data_page_offset + place_of.total_compressed_size
    content[end - 1] ^= 1
    file.write_bytes(content)
    run = open_run(place.database, 1)
    with pytest.raises(IdentityRefusedError, match=f"run 1: {file}: .*CRC checksum"):
        run.matrix()
    answer = script("export", "--run", "1", "--format", "npy", "--to", place.folder / "out")
    assert answer.status == 3
    assert f"run 1: {file}: could not verify page integrity" in answer.error


# ---- A file that changes after it was checked


def altered(file: Path, place: Place) -> bytes:
    """Other content for a checkpoint file: one value of each mean differs, size and footer do not.

    The file is first written as the other content is, and listed so, so that the sizes are equal.
    """
    table, footer = pq.read_table(file), pq.read_metadata(file).metadata
    means = np.array(table["mean_2"].to_pylist(), np.float32)
    versions: list[bytes] = []
    for first in (means[:, 0], means[:, 0] + 1):
        changed = pa.FixedSizeListArray.from_arrays(
            np.column_stack([first, means[:, 1:]]).astype(np.float32).ravel(), means.shape[1]
        )
        column = table.schema.get_field_index("mean_2")
        version = table.set_column(column, table.schema.field(column), changed)
        sink = pa.BufferOutputStream()
        schema = table.schema.with_metadata({FOOTER_KEY: footer[FOOTER_KEY]})
        pq.write_table(version.cast(schema), sink, compression="none", use_dictionary=False)
        versions.append(sink.getvalue().to_pybytes())
    good, other = versions
    assert len(good) == len(other)
    file.write_bytes(good)
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql(
            f"UPDATE checkpoints SET bytes = {len(good)}, sha256 = '{file_sha256(file)}' "
            f"WHERE path = '{file.name}'"
        )
    return other


def written_in_place(file: Path, content: bytes) -> None:
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed_over(file: Path, content: bytes) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)


READS: dict[str, Callable[[RunEmbeddings], object]] = {
    "matrix": lambda run: run.matrix(),
    "residues": lambda run: [run.residues(record, 0) for record in run.records.tolist()],
    "table": lambda run: run.table("id"),
    "stored": lambda run: [*run.stored("mean_2")],
}


@pytest.mark.parametrize("swap", [written_in_place, renamed_over])
@pytest.mark.parametrize("read", READS)
def test_a_file_swapped_after_it_was_verified_is_not_read(
    embedded: Runs, place: Place, swap: Callable[[Path, bytes], None], read: str
) -> None:
    """Size and mtime are those of the file that was verified; it used to be read all the same."""
    file = embedded[1] / "checkpoint-000001.parquet"
    other = altered(file, place)
    run = open_run(place.database, 1, verify=True)
    READS[read](run)
    swap(file, other)
    with pytest.raises(IdentityRefusedError) as caught:
        READS[read](run)
    assert str(caught.value) == f"run 1: {file}: changed since it was checked"


@pytest.mark.parametrize("swap", [written_in_place, renamed_over])
def test_a_file_swapped_between_digest_and_footer_is_not_read(
    embedded: Runs,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path, bytes], None],
) -> None:
    """Its rows used to be read as those that were verified."""
    file = embedded[1] / "checkpoint-000001.parquet"
    other = altered(file, place)
    sha256 = file_sha256(file)
    digested: Any = hashlib.file_digest

    def swapped_once_digested(opened: BinaryIO, name: str) -> Any:  # noqa: ANN401
        digest = digested(opened, name)
        if digest.hexdigest() == sha256:
            swap(file, other)
        return digest

    monkeypatch.setattr(hashlib, "file_digest", swapped_once_digested)
    with pytest.raises(IdentityRefusedError, match=f"{file}: changed since it was checked"):
        open_run(place.database, 1, verify=True)


def test_a_file_that_is_rewritten_while_it_is_read_is_not_delivered(
    embedded: Runs, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = embedded[1] / "checkpoint-000001.parquet"
    other = altered(file, place)
    run = open_run(place.database, 1, verify=True)
    read = pq.ParquetFile.read_row_group

    def rewritten_before_it_is_read(parquet: Any, *args: Any, **named: Any) -> object:  # noqa: ANN401
        written_in_place(file, other)
        return read(parquet, *args, **named)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", rewritten_before_it_is_read)
    with pytest.raises(IdentityRefusedError, match=f"{file}: changed since it was checked"):
        run.matrix()


@pytest.mark.parametrize(
    ("replace", "fact"),
    [
        (lambda file: file.unlink(), "no such regular file"),
        (lambda file: (file.rename(file.with_name("moved")), file.symlink_to("moved")), "no such"),
        (
            lambda file: (file.unlink(), subprocess.run(["mkfifo", file], check=True)),
            "no such regular file",
        ),
        (lambda file: (file.unlink(), file.mkdir()), "no such regular file"),
    ],
    ids=["gone", "a link", "a FIFO", "a folder"],
)
def test_what_is_no_file_any_more_is_refused(
    embedded: Runs, replace: Callable[[Path], object], fact: str
) -> None:
    run, folder = embedded
    file = folder / "checkpoint-000002.parquet"
    replace(file)
    with pytest.raises(IdentityRefusedError, match=f"{file}: {fact}"):
        run.matrix()


def test_no_file_is_kept_open(embedded: Runs, place: Place) -> None:
    """A run can have more files than a process may open."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    run = open_run(place.database, 1, verify=True)
    assert len(list(descriptors.iterdir())) == before
    for _rows, _table in run.stored("mean_2"):
        assert len(list(descriptors.iterdir())) == before + 1
    assert len(list(descriptors.iterdir())) == before


def test_an_export_of_a_swapped_file_leaves_nothing(
    embedded: Runs, place: Place, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = embedded[1] / "checkpoint-000001.parquet"
    other = altered(file, place)
    export = exports.export

    def swapped_before_it_is_exported(*args: Any) -> None:  # noqa: ANN401
        renamed_over(file, other)
        export(*args)

    monkeypatch.setattr("scripts.export.export", swapped_before_it_is_exported)
    to = place.folder / "out"
    answer = script("export", "--run", "1", "--format", "npy", "--to", to, "--verify")
    assert (answer.status, answer.error) == (3, f"run 1: {file}: changed since it was checked")
    assert not [path for path in place.folder.iterdir() if "out" in path.name]


def test_another_runs_file_of_the_same_name_is_refused(
    embedded: Runs, place: Place, script: Script, small_model: Path
) -> None:
    _run, folder = embedded
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 0
    other = place.output / "run-000002" / "checkpoint-000001.parquet"
    (folder / "checkpoint-000001.parquet").write_bytes(other.read_bytes())
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql(
            f"UPDATE checkpoints SET bytes = {other.stat().st_size} "
            "WHERE run_id = 1 AND path = 'checkpoint-000001.parquet'"
        )
    with pytest.raises(IdentityRefusedError, match="uuid in its footer differs"):
        open_run(place.database, 1)


def test_vectors_of_another_input_are_refused(embedded: Runs, place: Place) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql(f"UPDATE runs SET input_sha256 = '{'0' * 64}'")
    with pytest.raises(IdentityRefusedError, match="input_sha256 in its footer differs"):
        open_run(place.database, 1)


@pytest.mark.parametrize(
    ("written", "fact"),
    [
        ("[" * 100_000, "footer metadata is not JSON"),
        ('{"identity": []}', "footer has no identity"),
        (None, "footer has no esm_ledger metadata"),
    ],
)
def test_a_footer_that_says_nothing_is_refused(
    embedded: Runs, place: Place, written: str | None, fact: str
) -> None:
    file = embedded[1] / "checkpoint-000001.parquet"
    metadata = {} if written is None else {"esm_ledger": written}
    pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql(
            f"UPDATE checkpoints SET bytes = {file.stat().st_size} WHERE path = '{file.name}'"
        )
    with pytest.raises(IdentityRefusedError, match=f"{file.name}: {fact}$"):
        open_run(place.database, 1)


def test_reading_imports_no_torch_sqlalchemy_or_pandas(embedded: Runs, place: Place) -> None:
    code = (
        "import sys; from lib.embeddings import open_run; "
        f"run = open_run({str(place.database)!r}, 1); run.ids; run.matrix(); run.residues(3); "
        "sys.exit(bool({'torch', 'sqlalchemy', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_that_is_not_there(embedded: Runs, place: Place) -> None:
    with pytest.raises(SettingsError, match="run 7: not in database"):
        open_run(place.database, 7)


def test_a_number_of_numpy_is_a_number(embedded: Runs, place: Place) -> None:
    assert open_run(place.database, np.int64(1)).facts["id"] == 1
    with pytest.raises(SettingsError, match=f"run {10**20}: not in database"):
        open_run(place.database, 10**20)
