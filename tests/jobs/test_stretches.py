"""Stretches: if these fail, finished work is lost at an error, or a file is left that nobody lists.

No network and no database: this half of the work has neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.columns import Vectors
from lib.errors import InputError
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.sequences.plan import Pack
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence
from schema.parquet import FOOTER_KEY, VectorColumn, checkpoint_columns

MEAN = VectorColumn("mean", 1)


def pack(positions: range, *, ends_window: bool = False) -> Pack:
    sequences = [Sequence(b"MKLV", [Owner(i, f"p{i}", "", 4, "")]) for i in positions]
    return Pack(positions, sequences, ends_window)


def computed(*packs: Pack, failure: Exception | None = None) -> Iterator[tuple[Pack, Vectors]]:
    for one in packs:
        rows = np.array([[position, -position] for position in one.positions], np.float32)
        yield one, Vectors({MEAN: rows})
    if failure is not None:
        raise failure


def rules(folder: Path, *, seconds: float = 60, records: int = 1000) -> StretchRules:
    columns = checkpoint_columns(["mean"], [1], 2, "float32", digests=True)
    return StretchRules(folder, 7, columns, {"writer": "a test"}, seconds, records)


def cut(
    packs: Iterator[tuple[Pack, Vectors]], rules: StretchRules
) -> list[tuple[range, list[int], list[float]]]:
    """Return positions of each stretch, and the records and first values in its file."""
    found = []
    for stretch in finished_stretches(packs, rules, lambda _: None):
        table = pq.read_table(stretch.file.temporary)
        footer = json.loads(pq.read_metadata(stretch.file.temporary).metadata[FOOTER_KEY])
        positions = range(footer["first_position"], footer["stop_position"])
        assert positions == stretch.positions
        assert stretch.residues == 4 * len(positions)
        firsts = [row[0] for row in table.column("mean_1").to_pylist()]
        found.append((positions, table.column("record").to_pylist(), firsts))
        stretch.file.temporary.unlink()  # as a commit takes it away
    return found


def test_a_stretch_is_whole_packs_until_there_are_enough_records(tmp_path: Path) -> None:
    packs = computed(pack(range(2)), pack(range(2, 5)), pack(range(5, 6)), pack(range(6, 8)))
    assert cut(packs, rules(tmp_path, records=5)) == [
        (range(5), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (range(5, 8), [5, 6, 7], [5, 6, 7]),
    ]


def test_a_stretch_ends_when_its_time_is_over(tmp_path: Path) -> None:
    packs = computed(pack(range(2)), pack(range(2, 3)))
    assert [one[0] for one in cut(packs, rules(tmp_path, seconds=0))] == [range(2), range(2, 3)]


def test_a_stretch_ends_with_its_window(tmp_path: Path) -> None:
    packs = computed(pack(range(2)), pack(range(2, 3), ends_window=True), pack(range(3, 4)))
    assert [one[0] for one in cut(packs, rules(tmp_path))] == [range(3), range(3, 4)]


def test_a_stretch_ends_before_a_gap(tmp_path: Path) -> None:
    packs = computed(pack(range(2)), pack(range(5, 6)))
    assert [one[0] for one in cut(packs, rules(tmp_path))] == [range(2), range(5, 6)]


def test_a_failure_comes_after_the_stretch_before_it(tmp_path: Path) -> None:
    failure = InputError("in.fasta: changed while it was being read")
    packs = computed(pack(range(2)), pack(range(2, 3)), failure=failure)
    stretches = finished_stretches(packs, rules(tmp_path), lambda _: None)
    assert next(stretches).positions == range(3)
    with pytest.raises(InputError, match="changed while"):
        next(stretches)


def test_a_stretch_that_nobody_takes_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[Pack, Vectors]]:
        yield from computed(pack(range(2)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(finished_stretches(interrupted(), rules(tmp_path), lambda _: None))
    assert list(tmp_path.iterdir()) == []


def test_a_stretch_that_is_not_committed_leaves_no_file(tmp_path: Path) -> None:
    stretches = finished_stretches(computed(pack(range(2))), rules(tmp_path), lambda _: None)
    assert next(stretches).file.temporary.exists()
    stretches.close()
    assert list(tmp_path.iterdir()) == []


def test_a_committed_file_is_not_removed(tmp_path: Path) -> None:
    stretches = finished_stretches(computed(pack(range(2))), rules(tmp_path), lambda _: None)
    committed = next(stretches).file.temporary.rename(tmp_path / "checkpoint-000001.parquet")
    stretches.close()
    assert list(tmp_path.iterdir()) == [committed]
