"""Windows: if these fail, a protein is left out, written twice, or given another one's vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.sequences import digests, records
from lib.sequences import inventory as inventories
from lib.sequences.inventory import Inventory, preflight
from lib.sequences.records import Record
from lib.sequences.windows import Window, read_windows
from tests.sequences.conftest import COMPRESS, SEQUENCES, rules, swap


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventories, "WINDOW_RECORDS", 3)
    monkeypatch.setattr(inventories, "WINDOW_RESIDUES", 40)


def plan(path: Path, content: str, **options: object) -> tuple[Inventory, list[Window]]:
    path.write_text(content)
    asked = rules(path, **options)
    inventory = preflight(asked)
    return inventory, list(read_windows(asked, inventory))


def owners(window: Window) -> list[tuple[bytes, list[str]]]:
    return [(s.residues, [owner.id for owner in s.owners]) for s in window.sequences]


def test_a_window_is_longest_first_then_by_record(path: Path) -> None:
    _, (window,) = plan(path, ">a\nMK\n>b\nMKTA\n>c\nGG\n>d\nGGG\n>e\nMKTG\n")
    assert [ids for _, ids in owners(window)] == [["b"], ["e"], ["d"], ["a"], ["c"]]


def test_identical_sequences_are_computed_once(path: Path) -> None:
    inventory, (window,) = plan(path, ">a\nMK\n>b\nGGG\n>c\nmk*\n>d\nMK\n")
    assert owners(window) == [(b"GGG", ["b"]), (b"MK", ["a", "c", "d"])]
    assert (inventory.records, inventory.sequences, inventory.residues) == (4, 2, 5)


def test_sequences_that_are_the_same_once_truncated_are_computed_once(path: Path) -> None:
    _, (window,) = plan(path, ">a\nMKTA\n>b\nMKTG\n>c\nMKT\n", max_residues=3)
    assert owners(window) == [(b"MKT", ["a", "b", "c"])]
    assert [owner.length for owner in window.sequences[0].owners] == [4, 4, 3]


@pytest.mark.usefixtures("small_windows")
def test_identical_sequences_in_other_windows_are_computed_once(path: Path) -> None:
    content = ">a\nMK\n>b\nGGG\n>c\nMK\n>d\nGGG\n>e\nW\n>f\nMK\n>g\nMK\n"
    inventory, windows = plan(path, content)
    assert [owners(window) for window in windows] == [
        [(b"GGG", ["b", "d"]), (b"MK", ["a", "c", "f", "g"])],
        [(b"W", ["e"])],
        [],
    ]
    assert [window.first_position for window in windows] == [0, 2, 3]
    assert (inventory.sequences, inventory.residues) == (3, 6)


@pytest.mark.usefixtures("small_windows")
def test_windows_are_bounded_in_records_and_residues(path: Path) -> None:
    lengths = [5, 5, 5, 30, 10, 1, 100, 1, 40, 1]
    content = "".join(f">r{i}\n{'M' * n}{'G' * i}\n" for i, n in enumerate(lengths))
    _, windows = plan(path, content, long_sequences="whole")
    for window in windows:
        held = [len(sequence.residues) for sequence in window.sequences]
        assert len(held) <= 3
        assert sum(held) <= 40 or len(held) == 1
    assert sum(len(window.sequences) for window in windows) == len(lengths)


FEW_SEQUENCES = st.lists(st.sampled_from(["MK", "GG", "MKTAY", "W"]) | SEQUENCES, min_size=1)


@settings(deadline=None)
@given(
    sequences=FEW_SEQUENCES,
    window_records=st.integers(1, 6),
    window_residues=st.integers(1, 40),
    chunk=st.integers(1, 6),
)
def test_every_record_is_in_the_plan_once_and_in_file_order(
    scratch: Path, sequences: list[str], window_records: int, window_residues: int, chunk: int
) -> None:
    content = "".join(f">r{i} d{i}\n{sequence}\n" for i, sequence in enumerate(sequences))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventories, "WINDOW_RECORDS", window_records)
        patch.setattr(inventories, "WINDOW_RESIDUES", window_residues)
        patch.setattr(digests, "_CHUNK", chunk)
        inventory, windows = plan(scratch, content)
    planned = [sequence for window in windows for sequence in window.sequences]
    assert len({sequence.residues for sequence in planned}) == len(planned)
    assert inventory.sequences == len(planned)
    assert inventory.residues == sum(len(sequence.residues) for sequence in planned)
    place = 0
    for window in windows:
        assert window.first_position == place
        place += len(window.sequences)
        lengths = [len(sequence.residues) for sequence in window.sequences]
        assert lengths == sorted(lengths, reverse=True)
    written = {}
    for sequence in planned:
        numbers = [owner.number for owner in sequence.owners]
        assert numbers == sorted(numbers)
        for owner in sequence.owners:
            assert owner.number not in written
            assert (owner.id, owner.description) == (f"r{owner.number}", f"d{owner.number}")
            written[owner.number] = sequence.residues.decode()
    assert [written[i] for i in range(len(sequences))] == sequences
    assert inventory.same_as.tolist() == [sequences.index(one) for one in sequences]


# ---- A file that changes under us


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    "changed",
    [
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nY\n",
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>f\nW\n",
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e now\nW\n",
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n",
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>e\nW\n>d\nGGG\n",
        ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n>f\nM\n",
        "",
    ],
    ids=["sequence", "id", "description", "shorter", "order", "longer", "empty"],
)
def test_a_file_that_changes_after_preflight_is_refused(path: Path, changed: str) -> None:
    path.write_text(">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n")
    inventory = preflight(rules(path))
    path.write_text(changed)
    with pytest.raises(InputError) as caught:
        list(read_windows(rules(path), inventory))
    assert str(caught.value) == f"{path}: changed while it was being read"


@pytest.mark.usefixtures("small_windows")
def test_windows_before_the_change_are_delivered(path: Path) -> None:
    path.write_text(">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n")
    inventory = preflight(rules(path))
    path.write_text(">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nY\n")
    windows = read_windows(rules(path), inventory)
    assert [ids for _, ids in owners(next(windows))] == [["b", "d"], ["c"], ["a"]]
    with pytest.raises(InputError):
        next(windows)


@pytest.mark.usefixtures("small_windows")
def test_a_window_whose_description_has_changed_is_not_delivered(path: Path) -> None:
    """Before the digest of the file is compared, at its end."""
    path.write_text(">a one\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n")
    inventory = preflight(rules(path))
    assert len(inventory.windows) > 1
    path.write_text(">a two\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n")
    with pytest.raises(InputError):
        next(read_windows(rules(path), inventory))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(("before", "after"), [("MKTA", "MKTG"), ("MJK", "M?K")])
def test_letters_that_are_not_embedded_are_compared_too(
    path: Path, before: str, after: str
) -> None:
    # `sequence_md5` is of all letters: of those cut off, and as they were before they became X.
    asked = rules(path, max_residues=3, unknown_residues="x")
    content = ">a\n{}\n>b\nGG\n>c\nMK\n>d\nW\n"
    path.write_text(content.format(before))
    inventory = preflight(asked)
    path.write_text(content.format(after))
    with pytest.raises(InputError, match="changed while it was being read"):
        next(read_windows(asked, inventory))


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", [None, *COMPRESS])
def test_other_bytes_are_refused_though_the_records_are_the_same(
    path: Path, kind: str | None
) -> None:
    """A comment is swapped between the two reads, size and mtime put back.

    When only records were compared, all windows were delivered under the digest of other bytes.
    """
    compress = COMPRESS[kind] if kind else bytes
    content = ">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n; {}\n"
    one, *others = (compress(content.format(i).encode()) for i in range(9))
    other = next(file for file in others if len(file) == len(one))
    path.write_bytes(one)
    inventory = preflight(rules(path))
    swap(path, other)
    windows = read_windows(rules(path), inventory)
    assert [ids for _, ids in owners(next(windows))] == [["b", "d"], ["c"], ["a"]]
    with pytest.raises(InputError, match=r"fasta: changed while it was being read$"):
        next(windows)
    swap(path, one)
    assert len(list(read_windows(rules(path), inventory))) == 2


@pytest.mark.usefixtures("small_windows")
def test_repeats_in_later_windows_are_read_from_the_same_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is swapped while preflight reads the repeats, and put back afterwards.

    The record at 3 got the vectors under another id, and no digest told.
    """
    content = b">a\nMK\n>b\nGGG\n>c\nMKT\n>d\nGGG\n>e\nW\n"
    path.write_bytes(content)
    read: Callable[..., Iterator[list[Record]]] = records.read_file
    reads = []

    def swapped_the_second_time(*args: object, several: bool) -> Iterator[list[Record]]:
        reads.append(args)
        swap(path, content.replace(b">d", b">x") if len(reads) == 2 else content)
        yield from read(*args, several=several)
        swap(path, content)

    monkeypatch.setattr(records, "read_file", swapped_the_second_time)
    monkeypatch.setattr(inventories, "read_file", swapped_the_second_time)
    with pytest.raises(InputError, match="changed while it was being read"):
        preflight(rules(path))
    assert len(reads) == 2
