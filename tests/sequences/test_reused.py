"""Reused sequences: if these fail, a record is left out, or gets the vectors of another one.

What is copied and what is computed must be the whole input together, whatever is reused.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.sequences import inventory as inventories
from lib.sequences import rearranged, reused
from lib.sequences.describing import describe_owners
from lib.sequences.inventory import Inventory, preflight
from lib.sequences.rearranged import rearranged_records, rearranged_windows
from lib.sequences.reused import Reused, bounded_windows, planned_lengths, planned_windows
from lib.sequences.windows import Window
from schema.parquet import DESCRIBING
from schema.settings import InputSettings
from tests.sequences.conftest import SEQUENCES, rules, swap


@pytest.fixture(scope="module", autouse=True)
def small_bounds() -> object:
    """Windows of three records or 40 residues, read two records at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (inventories, reused):
            patch.setattr(module, "WINDOW_RECORDS", 3)
            patch.setattr(module, "WINDOW_RESIDUES", 40)
        patch.setattr(rearranged, "_RECORDS", 2)
        yield


def planned(path: Path, sequences: list[str]) -> tuple[InputSettings, Inventory]:
    path.write_text("".join(f">r{i} of a test\n{one}\n" for i, one in enumerate(sequences)))
    asked = rules(path, max_residues=9)
    return asked, preflight(asked)


def described(windows: list[Window]) -> pa.Table:
    batches = [describe_owners(window.sequences) for window in windows]
    return pa.Table.from_batches(batches, DESCRIBING)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), sequences=st.lists(SEQUENCES, min_size=1, max_size=20))
def test_copied_and_computed_are_the_whole_input(
    scratch: Path, data: st.DataObject, sequences: list[str]
) -> None:
    asked, inventory = planned(scratch, sequences)
    different = inventory.first_records().tolist()
    chosen = data.draw(st.lists(st.sampled_from(different), unique=True))
    reuse = Reused(np.array(chosen, np.int64), inventory.records)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(chosen)), max_size=4)) | {0, len(chosen)})
    ranges = [range(*pair) for pair in itertools.pairwise(cuts)]
    copied = [*rearranged_records(asked, inventory, reuse, ranges, scratch.parent)]
    computed = [*planned_windows(asked, inventory, reuse)]

    # Each range by position, and its records in file order.
    assert [positions for positions, _ in copied] == ranges
    for positions, table in copied:
        rows = table.select(["position", "record"]).to_pylist()
        expected = [
            {"position": position, "record": record}
            for position in positions
            for record in np.flatnonzero(inventory.same_as == chosen[position]).tolist()
        ]
        assert rows == expected
    # The same as windows that are to be computed.
    windows = [*rearranged_windows(asked, inventory, reuse, ranges, scratch.parent)]
    assert [window.first_position for window in windows] == [one.start for one in ranges]
    if copied:
        whole = pa.concat_tables([table.select(DESCRIBING.names) for _, table in copied])
        assert described(windows).to_pylist() == whole.to_pylist()
    # What is left follows, within the bounds, and every record is there once.
    position = len(chosen)
    for window in computed:
        assert window.first_position == position
        assert len(window.sequences) <= 3
        position += len(window.sequences)
    assert position == inventory.sequences
    numbers = described([*windows, *computed]).column("record").to_pylist()
    assert sorted(numbers) == list(range(len(sequences)))
    lengths = [len(one.residues) for window in [*windows, *computed] for one in window.sequences]
    assert planned_lengths(inventory, reuse).tolist() == lengths


@given(lengths=st.lists(st.integers(1, 60), max_size=30), start=st.integers(0, 30))
def test_positions_are_cut_within_the_bounds(lengths: list[int], start: int) -> None:
    positions = range(min(start, len(lengths)), len(lengths))
    cut = [*bounded_windows(positions, np.array(lengths, np.int32))]
    assert [position for part in cut for position in part] == [*positions]
    for part in cut:
        assert 0 < len(part) <= 3
        assert len(part) == 1 or sum(lengths[i] for i in part) <= 40
    for part, after in itertools.pairwise(cut):
        assert len(part) == 3 or sum(lengths[i] for i in part) + lengths[after.start] > 40


def test_no_file_is_left_and_a_changed_input_is_refused(path: Path) -> None:
    asked, inventory = planned(path, ["MKTA", "GG", "GGS"])
    reuse = Reused(np.array([2, 0]), inventory.records)
    tables = rearranged_records(asked, inventory, reuse, [range(2)], path.parent)
    ((_, table),) = tables
    assert table.column("id").to_pylist() == ["r2", "r0"]
    assert [*path.parent.iterdir()] == [path]
    swap(path, path.read_bytes().replace(b"GGS", b"GGT"))
    with pytest.raises(InputError, match="changed while it was being read"):
        next(rearranged_records(asked, inventory, reuse, [range(2)], path.parent))


def test_digests_are_of_what_is_embedded_and_of_the_whole_sequence(path: Path) -> None:
    path.write_text(">a\nmkjta*\n>b\nMKXTA\n>c\nMKXTAG\n")
    asked = rules(path, max_residues=5, unknown_residues="x")
    inventory = preflight(asked, digests=True)
    (window,) = planned_windows(asked, inventory, None)
    rows = describe_owners(window.sequences).to_pylist()
    embedded = hashlib.sha256(b"MKXTA").digest()
    assert [row["embedded_sha256"] for row in rows] == [embedded] * 3
    # As UniProt writes it: `printf MKJTA | md5sum`, in capitals.
    assert [row["sequence_md5"] for row in rows] == [
        hashlib.md5(whole).hexdigest().upper() for whole in (b"MKJTA", b"MKXTA", b"MKXTAG")
    ]
    assert inventory.digests is not None
    assert inventory.digests.tobytes() == embedded[:16]


def test_the_md5_is_the_one_that_uniprot_has_for_p53(path: Path) -> None:
    # https://rest.uniprot.org/uniprotkb/P04637.json, sequence.md5
    p53 = (
        "MEEPQSDPSVEPPLSQETFSDLWKLLPENNVLSPLPSQAMDDLMLSPDDIEQWFTEDPGPDEAPRMPEAAPPVAPAPAAPTPAAPAPAPSWPLSSSV"
        "PSQKTYQGSYGFRLGFLHSGTAKSVTCTYSPALNKMFCQLAKTCPVQLWVDSTPPPGTRVRAMAIYKQSQHMTEVVRRCPHHERCSDSDGLAPPQHL"
        "IRVEGNLRVEYLDDRNTFRHSVVVPYEPPEVGSDCTTIHYNYMCNSSCMGGMNRRPILTIITLEDSSGNLLGRNSFEVRVCACPGRDRRTEEENLRK"
        "KGEPHHELPPGSTKRALPNNTSSSPQPKKKPLDGEYFTLQIRGRERFEMFRELNEALELKDAQAGKEPGGSRAHSSHLKSKKGQSTSRHKKLMFKTE"
        "GPDSD"
    )
    path.write_text(f">p53\n{p53.lower()}*\n")
    asked = rules(path, max_residues=10)
    (window,) = planned_windows(asked, preflight(asked), None)
    assert window.sequences[0].owners[0].md5 == "C133DFCE69F606F20865E9008199F852"
