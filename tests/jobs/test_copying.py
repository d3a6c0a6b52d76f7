"""Copying: if this fails, a run that copies a million known sequences outgrows a small machine.

No network and no database: files are copied that are written here.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.processes import peak_bytes
from lib.columns import Column, Vectors
from lib.embeddings.verified import ListedFile, verified_file
from lib.jobs import copying
from lib.jobs.copying import Copying, copied_stretches
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.ledger.reuse_plan import ReusePlan, Source
from lib.sequences.inventory import preflight
from lib.sequences.plan import Pack
from lib.sequences.reused import Reused
from lib.sequences.windows import Sequence, read_windows
from lib.settings import load_settings
from schema.parquet import VectorColumn, checkpoint_columns
from tests.processes import run_function
from tests.reference import write_fasta

WIDTH = 1280
RUN = {"id": 1, "uuid": "one", "esm2_config": {}, "input_sha256": "ab"}
MEAN, PER_TOK = VectorColumn("mean", 1), VectorColumn("per_tok", 1)


def rules(folder: Path, columns: list[VectorColumn], records: int) -> StretchRules:
    kinds = [column.kind for column in columns]
    layout = checkpoint_columns(kinds, [1], WIDTH, "float32", digests=True)
    identity = {key: RUN[key] for key in ("uuid", "esm2_config", "input_sha256")}
    return StretchRules(folder, 7, layout, {"identity": identity}, 3600, records)


def vectors_of(sequences: list[Sequence], columns: list[VectorColumn]) -> Vectors:
    """Return vectors that tell the sequences apart."""
    numbers = [one.owners[0].number for one in sequences]
    kept: dict[VectorColumn, Column] = {
        MEAN: np.repeat(np.array(numbers, np.float32)[:, None], WIDTH, 1)
    }
    if PER_TOK in columns:
        kept[PER_TOK] = [
            np.full((len(one.residues), WIDTH), one.owners[0].number, np.float32)
            for one in sequences
        ]
    return Vectors({column: kept[column] for column in columns})


def write_source(folder: Path, records: int, columns: list[VectorColumn]) -> None:
    """Write a FASTA file of random proteins, and what a run would have of them, in FASTA order."""
    folder.mkdir()
    chance = random.Random(records)
    entries = [(f"p{i}", "".join(chance.choices("ACDEFGHIKLMN", k=12))) for i in range(records)]
    fasta = write_fasta(folder / "input.fasta", entries)
    settings = load_settings(overrides={"input.fasta": [str(fasta)]}).input
    (window,) = read_windows(settings, preflight(settings))
    pack = Pack(range(records), window.sequences, True)
    done = [(pack, vectors_of(window.sequences, columns))]
    (stretch,) = finished_stretches(done, rules(folder, columns, records), lambda _: None)
    stretch.file.temporary.rename(folder / "source.parquet")


def copy(folder: Path, columns: list[VectorColumn], rows: range) -> tuple[Path, list[int]]:
    """Copy some rows of a source into one file; return it and how many were copied at once."""
    settings = load_settings(overrides={"input.fasta": [str(folder / "input.fasta")]}).input
    inventory = preflight(settings)
    path, chosen = folder / "source.parquet", np.array(rows)
    source = Source(1, "one", path.name, "", range(len(rows)))
    stored = pq.read_metadata(path).num_rows
    listed = ListedFile(RUN, path, path.stat().st_size, "", pq.read_schema(path), stored)
    parts: list[int] = []
    copying = Copying(
        ReusePlan([source], Reused(chosen, inventory.records), chosen.astype(np.int32)),
        settings,
        inventory,
        rules(folder, columns, len(rows)),
        [],
        lambda _: verified_file(listed, digest=False),
        stopped=lambda: False,
        copied=parts.append,
        say=pytest.fail,
    )
    (stretch,) = copied_stretches(copying)
    return stretch.file.temporary, parts


def print_growth(small: Path, large: Path, records: int) -> None:
    """Print the peak of copying a large file beyond what the process had after a small one."""
    copy(small, [MEAN], range(100))
    before = peak_bytes()
    copy(large, [MEAN], range(records))
    print(peak_bytes() - before)


def test_copying_holds_a_row_group_to_write_and_a_part_of_one_to_read(tmp_path: Path) -> None:
    small, large, records = tmp_path / "small", tmp_path / "large", 8000  # of 5 KB
    write_source(small, 100, [MEAN])
    write_source(large, records, [MEAN])
    answer = run_function(partial(print_growth, small, large, records))
    assert answer.status == 0, answer.err
    # It is 43 MB, was 72 to 87 with row groups of 34 MB, and 212 when Arrow read them as a whole.
    assert int(answer.out) <= 55e6


def test_rows_of_several_parts_are_the_ones_that_were_chosen(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 1500, [MEAN])
    path, parts = copy(tmp_path / "source", [MEAN], range(3, 1400, 7))
    assert len(parts) > 2
    table = pq.read_table(path)
    chosen = [*range(3, 1400, 7)]
    assert table.column("record").to_pylist() == chosen
    assert [row[-1] for row in table.column("mean_1").to_pylist()] == chosen


def test_parts_are_as_large_as_the_columns_that_are_copied(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 100, [MEAN, PER_TOK])  # 61 KB a row, of which means are 5
    assert copy(tmp_path / "source", [MEAN], range(100))[1] == [100]
    assert len(copy(tmp_path / "source", [MEAN, PER_TOK], range(100))[1]) > 2


@pytest.mark.parametrize("places", [[0, 1], [0, 0], [1, 0], [1], [0, 1, 1]], ids=str)
def test_rows_are_taken_at_their_places(places: list[int]) -> None:
    """All of them in order are taken without a copy; as many of others are others."""
    table = pa.Table.from_arrays([pa.array(["one", "two"])], ["id"])
    taken = copying._at(table, np.array(places)).column("id").to_pylist()
    assert taken == [("one", "two")[place] for place in places]
