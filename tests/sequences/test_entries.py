"""Layouts of FASTA: if these fail, a line of a user's file is lost or read as something else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import LedgerError
from lib.sequences import entries
from lib.sequences import records as records_module
from lib.sequences.records import Record
from tests.conftest import UNIPROT_PART
from tests.sequences.conftest import COMPRESS, SEQUENCES, UNKNOWN, read, refusal, residues


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("width", [1, 3, 60, 10_000])
@pytest.mark.parametrize("final", [True, False])
def test_a_layout_changes_nothing(path: Path, line_end: str, width: int, final: bool) -> None:
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3
    lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
    content = line_end.join(["", ">a b c", *lines, "", ">b", "GG"]) + line_end * final
    assert read(path, content) == [
        Record(0, "a", "b c", len(sequence), sequence.encode(), 0, sequence.encode()),
        Record(1, "b", "", 2, b"GG", 0, b"GG"),
    ]


def test_blanks_around_lines_are_no_residues(path: Path) -> None:
    assert residues(read(path, ">a\n  MKT \n\tAY\t\n   \nIAK\n")) == [b"MKTAYIAK"]


@pytest.mark.parametrize(
    ("content", "line", "shown"),
    [
        ("MKT\n", 1, "MKT"),
        ("MKT\n>a\nMK\n", 1, "MKT"),
        ("\n\n MKT\n", 3, "MKT"),
        ("@a\nMK\n+\nII\n", 1, "@a"),
        ("# a comment\n>a\nMK\n", 1, "# a comment"),
        (";LCBO - Prolactin precursor\nMDSK\n", 2, "MDSK"),
        ("%PDF-1.7\n%\xb5\xb5\n>\n", 1, "%PDF-1.7"),
        ("M" * 1000, 1, "M" * 80 + "…"),
    ],
)
def test_text_before_the_first_header_is_refused(
    path: Path, content: str, line: int, shown: str
) -> None:
    expected = f"line {line}: expected '>' at the beginning of a record, got {shown!r}"
    assert refusal(path, content) == expected


# ---- Comments and marks


def test_semicolon_lines_are_comments(path: Path) -> None:
    content = "; a list\n>a\n;one\nMK\n;two\n ; three\nTAY\n;\n>b;c d;e\nGG\n;end"
    assert read(path, content) == [
        Record(0, "a", "", 5, b"MKTAY", 0, b"MKTAY"),
        Record(1, "b;c", "d;e", 2, b"GG", 0, b"GG"),
    ]


def test_lines_that_begin_with_a_number_sign_are_never_dropped(path: Path) -> None:
    told = refusal(path, ">a\nMK\n#TAY\nIA\n")
    assert told == f"record 0 (a): {UNKNOWN.format('#', 3)}"
    assert refusal(path, "#\n>a\nMK\n").startswith("line 1: expected '>'")


@pytest.mark.parametrize("before", ["", "\n", " "])
def test_a_byte_order_mark_is_no_text(path: Path, before: str) -> None:
    assert residues(read(path, f"\ufeff{before}>a\nMK\n")) == [b"MK"]


@pytest.mark.parametrize("piece", [1, 4, 1 << 16])
def test_a_byte_order_mark_does_not_part_a_header_from_its_sequence(
    path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(entries, "_PIECE", piece)
    assert residues(read(path, "\ufeff>a\nMK")) == [b"MK"]
    assert residues(read(path, " \ufeff >a\nMK\n>b\nG")) == [b"MK", b"G"]


def test_a_byte_order_mark_between_files_is_refused(path: Path) -> None:
    told = refusal(path, ">a\nMK\n\ufeff>b\nGG\n")
    assert told == f"record 0 (a): {UNKNOWN.format(chr(92) + 'ufeff', 3)}"


def test_text_in_utf16_is_refused(path: Path) -> None:
    assert refusal(path, ">a\nMK\n".encode("utf-16")).startswith("line 1: expected '>'")


# ---- Any file at all

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=10)
RECORDS = st.lists(
    st.tuples(WORDS, st.lists(WORDS, max_size=3).map(" ".join), SEQUENCES), max_size=6
)


# How much of a file is read at once: little, so that pieces end anywhere in a line.
PIECES = st.sampled_from([1, 2, 3, 5, 8, 13, 64, 1 << 16])


@settings(deadline=None)
@given(records=RECORDS, piece=PIECES, data=st.data())
def test_any_records_in_any_layout_are_read_back(
    scratch: Path, records: list[tuple[str, str, str]], piece: int, data: st.DataObject
) -> None:
    line_end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    blank = st.sampled_from(["", line_end, f" \t{line_end}"])
    content = data.draw(blank)
    for name, description, sequence in records:
        gap = data.draw(st.sampled_from([" ", "  ", "\t"])) if description else ""
        content += f">{name}{gap}{description}{line_end}{data.draw(blank)}"
        width = data.draw(st.integers(1, 15))
        cased = sequence.lower() if data.draw(st.booleans()) else sequence
        cased += "*" * data.draw(st.integers(0, 1))
        for i in range(0, len(cased), width):
            content += cased[i : i + width] + line_end + data.draw(blank)
    if data.draw(st.booleans()):
        content = content.rstrip()
    compress = data.draw(st.sampled_from([bytes, *COMPRESS.values()]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "_PIECE", piece)
        found = read(scratch, compress(content.encode()))
    assert [(r.id, r.description, r.residues.decode()) for r in found] == records
    assert [r.number for r in found] == list(range(len(records)))


ODD_PIECES = [
    b">a b\n", b">c\n", b"MK\n", b"mk*\n", b"\r\n", b" >d\n", b"\n", b";x\n", b"MJ\n", b">", b"*",
    b">e \x1c\xc2\xa0f \n", b"\xef\xbb\xbf",
]  # fmt: skip
ODD = st.text(">>>\n\n\n\r \taMK*;#J\v\fé\0").map(str.encode) | st.lists(
    st.sampled_from(ODD_PIECES)
).map(b"".join)


def outcome(path: Path, content: bytes, **options: object) -> object:
    try:
        return read(path, content, **options)
    except LedgerError as error:
        return str(error)


@settings(deadline=None, max_examples=200)
@given(content=ODD | st.binary(), piece=PIECES, mapped=st.booleans(), limit=st.integers(1, 5))
def test_blocks_read_as_a_whole_and_line_by_line_are_the_same(
    scratch: Path, content: bytes, piece: int, mapped: bool, limit: int
) -> None:
    options = {"unknown_residues": "x" if mapped else "error", "max_residues": limit}
    options["long_sequences"] = ("truncate", "error", "whole")[limit % 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "_PIECE", piece)
        found = outcome(scratch, content, **options)
        patch.setattr(records_module, "_plain_records", lambda *_: None)
        by_line = outcome(scratch, content, **options)
        patch.setattr(entries, "_PIECE", 1 << 16)
        at_once = outcome(scratch, content, **options)
    assert found == by_line == at_once


def test_most_blocks_of_a_usual_file_are_read_as_a_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line it is right and three times as slow."""
    monkeypatch.delattr(records_module, "_checked_records")
    for content in (UNIPROT_PART.read_bytes(), b">a\r\nmktay*\r\n>b c\r\nGG\r\nGG\r\n"):
        assert read(path, content)


def test_a_file_without_a_header_is_refused_before_it_is_read_to_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_PIECE", 64)
    pieces = entries._whole_lines

    def only_the_first(file: Any) -> Iterator[bytes]:  # noqa: ANN401
        yield next(pieces(file))
        raise AssertionError("read on")

    monkeypatch.setattr(entries, "_whole_lines", only_the_first)
    assert refusal(path, "; c\n\nMKTAY\n" * 100).startswith("line 3: expected '>'")


def test_the_line_of_a_fault_before_the_first_header_is_counted_over_pieces(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_PIECE", 16)
    assert refusal(path, "; comment\n\n" * 50 + "MKTAY\n").startswith("line 101: expected '>'")


def test_a_long_sequence_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of many pieces: 20 times the pieces take 20 times the copying, not 400 times."""
    monkeypatch.setattr(entries, "_PIECE", 1 << 10)
    content = (">a\n" + "MKTAYIAKQR" * 40_000 + "\n" + "MKTAYIAKQR\n" * 40_000).encode()
    tracemalloc.start()
    (record,) = read(path, content, long_sequences="whole")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert record.length == 800_000
    assert most < 12 * len(content)


@settings(deadline=None)
@given(content=st.binary() | st.text(">aMKJ* \r\n#;é\0").map(str.encode), mapped=st.booleans())
def test_any_bytes_are_records_or_refused_in_one_line(
    scratch: Path, content: bytes, mapped: bool
) -> None:
    try:
        records = read(scratch, content, unknown_residues="x" if mapped else "error")
    except LedgerError as error:
        assert error.exit_status == 2
        assert len(str(error).splitlines()) == 1
    else:
        assert all(record.residues and record.id for record in records)
