"""Layouts of FASTA: if these fail, a line of a user's file is lost or read as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import LedgerError
from lib.sequences.records import Record
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


@settings(deadline=None)
@given(records=RECORDS, data=st.data())
def test_any_records_in_any_layout_are_read_back(
    scratch: Path, records: list[tuple[str, str, str]], data: st.DataObject
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
    found = read(scratch, compress(content.encode()))
    assert [(r.id, r.description, r.residues.decode()) for r in found] == records
    assert [r.number for r in found] == list(range(len(records)))


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
