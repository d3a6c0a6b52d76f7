"""The rules of [input]: if these fail, a user's protein is silently changed or left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.sequences.alphabet import LETTERS
from lib.sequences.inventory import preflight
from lib.sequences.records import Record
from tests import reference
from tests.conftest import UNIPROT_PART, WHOLE_PROTEINS
from tests.sequences.conftest import (
    UNKNOWN,
    UNKNOWN_LETTER,
    read,
    records_of,
    refusal,
    residues,
    rules,
)


def test_a_record_is_read_as_written(path: Path) -> None:
    records = read(path, ">sp|P1|A_B  some protein OS=X\nMKTAY\nIAK\n>b\nGG\n")
    assert records == [
        Record(0, "sp|P1|A_B", "some protein OS=X", 8, b"MKTAYIAK", 0, b"MKTAYIAK"),
        Record(1, "b", "", 2, b"GG", 0, b"GG"),
    ]


@pytest.mark.parametrize("path_of_real", [WHOLE_PROTEINS, UNIPROT_PART])
def test_real_files_are_read_as_the_plainest_code_does(path_of_real: Path) -> None:
    records = records_of(rules(path_of_real, long_sequences="whole"))
    expected = reference.fasta(path_of_real)
    assert len(expected) > 10
    assert [f"{r.id} {r.description}".strip() for r in records] == [name for name, _ in expected]
    assert residues(records) == [sequence.encode() for _, sequence in expected]


# ---- Letters


def test_letters_are_upper_cased(path: Path) -> None:
    assert residues(read(path, ">a\nmkTay\n")) == [b"MKTAY"]


def test_one_trailing_star_is_dropped(path: Path) -> None:
    assert read(path, ">a\nMKT*\n") == [Record(0, "a", "", 3, b"MKT", 0, b"MKT")]
    assert residues(read(path, ">a\nMKT\n*\n")) == [b"MKT"]


@pytest.mark.parametrize("letter", LETTERS.decode())
def test_every_letter_of_the_alphabet_is_read(path: Path, letter: str) -> None:
    assert residues(read(path, f">a\nM{letter}{letter.lower()}\n")) == [f"M{letter * 2}".encode()]


@pytest.mark.parametrize(
    ("sequence", "letter", "position"),
    [
        ("MKJT", "J", 3),
        ("MKjT", "J", 3),
        ("JJ", "J", 1),
        ("MK*T", "*", 3),
        ("MKT**", "*", 4),
        ("MK?", "?", 3),
        ("MK1T", "1", 3),
        ("MK T", " ", 3),
        ("MK\tT", "\\t", 3),
        ("MK>T", ">", 3),
        ("MK\0T", "\\x00", 3),
        ("MKé", "é", 3),
        ("M\u212a", "\u212a", 2),  # the Kelvin sign, which lower() makes a k
        ("MKß", "ß", 3),  # which upper() makes two letters
    ],
)
def test_unknown_letters_are_refused_with_record_id_position_and_letter(
    path: Path, sequence: str, letter: str, position: int
) -> None:
    told = refusal(path, f">ok\nMKT\n>my id\n{sequence}\n")
    fact = UNKNOWN_LETTER if letter in "J*?" else UNKNOWN
    assert told == f"record 1 (my): {fact.format(letter, position)}"


def test_positions_count_over_line_breaks(path: Path) -> None:
    told = refusal(path, ">a\nMKTAY\nIAK\nQRJ\n")
    assert told == f"record 0 (a): {UNKNOWN_LETTER.format('J', 11)}"


def test_letters_beyond_the_truncation_are_checked_too(path: Path) -> None:
    told = refusal(path, ">a\nMKTAYJ\n", max_residues=3)
    assert told == f"record 0 (a): {UNKNOWN_LETTER.format('J', 6)}"


def test_unknown_letters_read_as_x_are_counted(path: Path) -> None:
    records = read(path, ">a\nMJ?*K**\n>b\nMKT*\n>c\njj\n", unknown_residues="x")
    assert residues(records) == [b"MXXXKX", b"MKT", b"XX"]
    assert [record.mapped for record in records] == [4, 0, 2]
    assert preflight(rules(path, unknown_residues="x")).mapped == 6


@pytest.mark.parametrize("letter", ["1", "é", "_", "#", "@", "[", "`", "{"])
def test_what_is_no_letter_is_never_read_as_x(path: Path, letter: str) -> None:
    told = refusal(path, f">a\nMK{letter}T\n", unknown_residues="x")
    assert told == f"record 0 (a): {UNKNOWN.format(letter, 3)}"


@pytest.mark.parametrize("content", [">a\n>b\nMK\n", ">a\n\n>b\nMK\n", ">a\n*\n>b\nMK\n", ">a"])
def test_empty_sequences_are_refused(path: Path, content: str) -> None:
    assert refusal(path, content) == "record 0 (a): empty sequence"


# ---- Headers


@pytest.mark.parametrize("header", [">", "> ", ">\t", ">\r"])
def test_empty_ids_are_refused(path: Path, header: str) -> None:
    assert refusal(path, f">a\nMK\n{header}\nMK\n") == "record 1: empty id"


def test_descriptions_are_unicode(path: Path) -> None:
    (record,) = read(path, ">蛋白 protéine α\nMK\n")
    assert (record.id, record.description) == ("蛋白", "protéine α")


def test_a_header_that_is_not_utf8_is_refused(path: Path) -> None:
    told = refusal(path, b">a\nMK\n>b prot\xe9ine\nMK\n")
    assert told == "record 1: byte 0xe9 of its header is not UTF-8"


def test_headers_end_in_any_letter(path: Path) -> None:
    # Bytes of UTF-8 that Latin-1 calls blanks or line ends: U+0085, U+00A0, U+001C.
    records = read(path, ">a à\nMK\n>b 充\nGG\n>…\nW\n")
    assert [(r.id, r.description) for r in records] == [("a", "à"), ("b", "充"), ("…", "")]


def test_a_nul_byte_in_a_header_is_refused(path: Path) -> None:
    assert refusal(path, ">a\nMK\n>b\0c\nMK\n") == "record 1 (b\\x00c): NUL byte in its header"


def test_an_error_shows_80_letters_of_an_id(path: Path) -> None:
    told = refusal(path, f">{'i' * 10_000_000}\n\n")
    assert told == f"record 0 ({'i' * 80}…): empty sequence"


def test_an_error_sends_no_control_characters_to_the_terminal(path: Path) -> None:
    assert refusal(path, ">\x1b[2Jé\n\n") == "record 0 (\\x1b[2Jé): empty sequence"


# ---- Long sequences


@pytest.mark.parametrize("length", [1021, 1022, 1023, 5000])
def test_1022_residues_are_embedded_of_a_long_sequence(path: Path, length: int) -> None:
    sequence = ("MKTAYIAKQR" * 500)[:length]
    (record,) = read(path, f">a\n{sequence}\n")
    assert record.length == length
    assert record.residues == sequence[:1022].encode()
    assert preflight(rules(path)).truncated == (length > 1022)


def test_a_star_does_not_make_a_sequence_long(path: Path) -> None:
    path.write_text(f">a\n{'M' * 1022}*\n")
    inventory = preflight(rules(path, long_sequences="error"))
    assert (inventory.longest, inventory.truncated, inventory.residues) == (1022, 0, 1022)


def test_long_sequences_are_refused_if_asked(path: Path) -> None:
    fits = f">ok\n{'M' * 1022}\n"
    told = refusal(path, f"{fits}>a\n{'M' * 1023}\n", long_sequences="error")
    assert told == "record 1 (a): 1023 residues exceed max_residues 1022 (input.long_sequences)"
    assert len(read(path, fits, long_sequences="error")) == 1


def test_long_sequences_are_embedded_whole_if_asked(path: Path) -> None:
    (record,) = read(path, f">a\n{'M' * 1023}\n", long_sequences="whole")
    assert (record.length, len(record.residues)) == (1023, 1023)
    assert preflight(rules(path, long_sequences="whole")).truncated == 0


def test_max_residues_is_what_config_says(path: Path) -> None:
    (record,) = read(path, ">a\nMKTAY\n", max_residues=3)
    assert (record.length, record.residues) == (5, b"MKT")
