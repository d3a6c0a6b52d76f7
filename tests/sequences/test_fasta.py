"""FASTA in: the rules of [input], the counts, and the plan of windows.

If these fail, a user's protein is silently changed, left out, written twice, or given another
protein's vectors.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError, LedgerError
from lib.sequences import records as fasta
from lib.sequences.alphabet import LETTERS
from lib.sequences.records import Inventory, Record, Window, preflight, read_records, read_windows
from lib.settings import load_settings
from schema.settings import InputSettings
from tests import reference
from tests.conftest import SOME_PROTEINS, UNIPROT_PART, Place, Script

CHECKSUM = zstd.CompressionParameter.checksum_flag
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstd.compress(content, options={CHECKSUM: 1}),
}
UNKNOWN = "'{}' at residue {} is not in the ESM-2 alphabet"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proteins.fasta"


def rules(path: Path, **options: object) -> InputSettings:
    said = {f"input.{option}": str(value) for option, value in options.items()}
    return load_settings(overrides={"input.fasta": str(path), **said}).input


def read(path: Path, content: str | bytes, **options: object) -> list[Record]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_records(rules(path, **options)))


def refusal(path: Path, content: str | bytes, **options: object) -> str:
    """The one line with which preflight refuses a file, without the file's path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        preflight(rules(path, **options))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}: ")


def told(path: Path, error: str) -> str:
    """An error about a file, without the file's path."""
    assert error.startswith(f"{path}: ")
    return error.removeprefix(f"{path}: ")


def residues(records: list[Record]) -> list[bytes]:
    return [record.residues for record in records]


# ---- Letters


def test_a_record_is_read_as_written(path: Path) -> None:
    records = read(path, ">sp|P1|A_B  some protein OS=X\nMKTAY\nIAK\n>b\nGG\n")
    assert records == [
        Record(0, "sp|P1|A_B", "some protein OS=X", 8, b"MKTAYIAK", 0),
        Record(1, "b", "", 2, b"GG", 0),
    ]


@pytest.mark.parametrize("path_of_real", [SOME_PROTEINS, UNIPROT_PART])
def test_real_files_are_read_as_the_plainest_code_does(path_of_real: Path) -> None:
    records = list(read_records(rules(path_of_real, long_sequences="whole")))
    expected = reference.fasta(path_of_real)
    assert len(expected) > 10
    assert [f"{r.id} {r.description}".strip() for r in records] == [name for name, _ in expected]
    assert residues(records) == [sequence.encode() for _, sequence in expected]


def test_letters_are_upper_cased(path: Path) -> None:
    assert residues(read(path, ">a\nmkTay\n")) == [b"MKTAY"]


def test_one_trailing_star_is_dropped(path: Path) -> None:
    assert read(path, ">a\nMKT*\n") == [Record(0, "a", "", 3, b"MKT", 0)]
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
    assert told == f"record 1 (my): {UNKNOWN.format(letter, position)}"


def test_positions_count_over_line_breaks(path: Path) -> None:
    told = refusal(path, ">a\nMKTAY\nIAK\nQRJ\n")
    assert told == f"record 0 (a): {UNKNOWN.format('J', 11)}"


def test_letters_beyond_the_truncation_are_checked_too(path: Path) -> None:
    told = refusal(path, ">a\nMKTAYJ\n", max_residues=3)
    assert told == f"record 0 (a): {UNKNOWN.format('J', 6)}"


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


@pytest.mark.parametrize("header", [">", "> ", ">\t", ">\r"])
def test_empty_ids_are_refused(path: Path, header: str) -> None:
    assert refusal(path, f">a\nMK\n{header}\nMK\n") == "record 1: empty id"


# ---- Repeated ids


def test_repeated_ids_are_refused(path: Path) -> None:
    content = ">a\nMK\n>b\nMK\n>c\nMK\n>b other\nMKT\n>a\nMK\n"
    assert refusal(path, content) == "record 3 (b): id repeats record 1's"


def test_repeated_ids_are_kept_if_asked(path: Path) -> None:
    path.write_text(">a\nMK\n>a\nMKT\n")
    inventory = preflight(rules(path, duplicate_ids="keep"))
    assert (inventory.records, inventory.sequences) == (2, 2)


def test_ids_that_differ_in_case_are_not_repeated(path: Path) -> None:
    path.write_text(">a\nMK\n>A\nMKT\n>é\nGG\n>\u0065\u0301\nGGG\n")
    assert preflight(rules(path)).records == 4


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
    assert told == "record 1 (a): 1023 residues exceed max_residues 1022"
    assert len(read(path, fits, long_sequences="error")) == 1


def test_long_sequences_are_embedded_whole_if_asked(path: Path) -> None:
    (record,) = read(path, f">a\n{'M' * 1023}\n", long_sequences="whole")
    assert (record.length, len(record.residues)) == (1023, 1023)
    assert preflight(rules(path, long_sequences="whole")).truncated == 0


def test_max_residues_is_what_config_says(path: Path) -> None:
    (record,) = read(path, ">a\nMKTAY\n", max_residues=3)
    assert (record.length, record.residues) == (5, b"MKT")


# ---- Layouts


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("width", [1, 3, 60, 10_000])
@pytest.mark.parametrize("final", [True, False])
def test_a_layout_changes_nothing(path: Path, line_end: str, width: int, final: bool) -> None:
    sequence = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3
    lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
    content = line_end.join(["", ">a b c", *lines, "", ">b", "GG"]) + line_end * final
    assert read(path, content) == [
        Record(0, "a", "b c", len(sequence), sequence.encode(), 0),
        Record(1, "b", "", 2, b"GG", 0),
    ]


def test_blanks_around_lines_are_no_residues(path: Path) -> None:
    assert residues(read(path, ">a\n  MKT \n\tAY\t\n   \nIAK\n")) == [b"MKTAYIAK"]


def test_descriptions_are_unicode(path: Path) -> None:
    (record,) = read(path, ">蛋白 protéine α\nMK\n")
    assert (record.id, record.description) == ("蛋白", "protéine α")


def test_a_header_that_is_not_utf8_is_refused(path: Path) -> None:
    told = refusal(path, b">a\nMK\n>b prot\xe9ine\nMK\n")
    assert told == "record 1: byte 0xe9 of its header is not UTF-8"


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


# ---- Comments, marks and headers


def test_semicolon_lines_are_comments(path: Path) -> None:
    content = "; a list\n>a\n;one\nMK\n;two\n ; three\nTAY\n;\n>b;c d;e\nGG\n;end"
    assert read(path, content) == [
        Record(0, "a", "", 5, b"MKTAY", 0),
        Record(1, "b;c", "d;e", 2, b"GG", 0),
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


@pytest.mark.parametrize("content", ["", "\n", "\r\n \n"])
def test_a_file_without_records_is_refused(path: Path, content: str) -> None:
    assert refusal(path, content) == "no records"


# ---- Files


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("named", [True, False])
def test_compressed_files_are_read(tmp_path: Path, kind: str, named: bool) -> None:
    path = tmp_path / (f"a.fasta.{kind}" if named else "a.fasta")
    path.write_bytes(COMPRESS[kind](UNIPROT_PART.read_bytes()))
    plain = list(read_records(rules(UNIPROT_PART)))
    assert list(read_records(rules(path))) == plain
    assert preflight(rules(path)).records == len(plain)


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("kept", [5, 20, 0.3, 0.5, 0.99, -9, -1])
def test_truncated_compressed_files_are_refused(
    script: Script, tmp_path: Path, small_model: Path, kind: str, kept: float
) -> None:
    path = tmp_path / f"a.fasta.{kind}"
    whole = COMPRESS[kind](UNIPROT_PART.read_bytes())
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    answer = script("embed", "--esm-model", small_model, "--input", path)
    assert answer.status == 2
    assert re.match(r"(before the first record|after record \d+): ", told(path, answer.error))


@pytest.mark.parametrize("kind", COMPRESS)
def test_damaged_compressed_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.fasta.{kind}"
    whole = COMPRESS[kind](UNIPROT_PART.read_bytes())
    draw = random.Random(0)
    for _ in range(40):
        place = draw.randrange(len(whole) // 4, len(whole) * 3 // 4)
        damage = bytes([whole[place] ^ draw.randrange(1, 256)])
        refusal(path, whole[:place] + damage + whole[place + 1 :])


def streams(kind: str) -> bytes:
    """A file of three compressed streams, as pbzip2, pixz, bgzip and `cat` make them."""
    parts = [b">a some protein\nMKTAYIAKQRQISFVK\n", b">b\nGG\n>c\nGGG\n", b">d\nW\n"]
    return b"".join(map(COMPRESS[kind], parts))


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("named", [True, False])
def test_no_damaged_bit_loses_a_record(tmp_path: Path, kind: str, named: bool) -> None:
    path = tmp_path / (f"a.fasta.{kind}" if named else "a.fasta")
    whole = streams(kind)
    records = read(path, whole)
    assert [record.id for record in records] == ["a", "b", "c", "d"]
    refused = 0
    for place in range(len(whole)):
        for bit in range(8):
            damage = bytes([whole[place] ^ 1 << bit])
            try:
                assert read(path, whole[:place] + damage + whole[place + 1 :]) == records
            except InputError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > len(whole) * 8 // 2


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("behind", [b"x", b"junk", b"BZh", b">z\nMK\n", b"\x1f\x8b"])
def test_bytes_behind_the_last_stream_are_refused(tmp_path: Path, kind: str, behind: bytes) -> None:
    refusal(tmp_path / f"a.{kind}", COMPRESS[kind](b">a\nMK\n") + behind)


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta.gz"
    records = read(path, gzip.compress(b">a\nMK\n") + gzip.compress(b">b\nGG\n"))
    assert [record.id for record in records] == ["a", "b"]


def test_a_name_that_promises_compression_is_refused_without_it(tmp_path: Path) -> None:
    for kind in COMPRESS:
        refusal(tmp_path / f"a.fasta.{kind}", ">a\nMK\n>b\nGG\n")


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda _: None, "no such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
    ids=["missing", "folder", "fifo", "device", "dangling link"],
)
def test_what_is_no_file_is_refused(
    script: Script, path: Path, small_model: Path, make: Callable[[Path], None], fact: str
) -> None:
    make(path)
    answer = script("embed", "--esm-model", small_model, "--input", path)
    assert (answer.status, answer.error) == (2, f"{path}: {fact}")


def test_no_input_at_all_is_refused(script: Script, small_model: Path) -> None:
    answer = script("embed", "--esm-model", small_model)
    assert answer.status == 2
    assert answer.error == "no input: [input] fasta is empty and no --input was given"


def test_input_is_refused_before_the_model_is_loaded(
    script: Script, place: Place, path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("scripts.embed.load_model")
    path.write_text(">a\nMJ\n")
    answer = script("embed", "--esm-model", small_model, "--input", path)
    assert (answer.status, answer.error) == (2, f"record 0 (a): {UNKNOWN.format('J', 2)}")
    assert not place.output.exists()


def test_what_changes_sequences_is_told_at_startup(
    script: Script, path: Path, small_model: Path
) -> None:
    path.write_text(f">a\nMJ\n>b\n{'M' * 30}\n>c\nACGT\n>d\nMJ\n")
    options = ["--set", "input.max_residues=20", "--set", "input.unknown_residues=x"]
    answer = script("embed", "--esm-model", small_model, "--input", path, *options)
    assert answer.status == 0, answer.err
    lines = answer.err.splitlines()
    counted = "4 records, 3 different sequences, 26 residues to embed, longest 30"
    assert f"input {path}: {counted}" in lines
    assert "truncated to 20 residues: 1 records" in lines
    assert "unknown letters read as X: 2" in lines
    assert "only letters of ACGTUN (nucleotides?): 1 records" in lines


# ---- Windows: every record once, identical sequences computed once


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "WINDOW_RECORDS", 3)
    monkeypatch.setattr(fasta, "WINDOW_RESIDUES", 40)


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


SEQUENCES = st.text(LETTERS.decode(), min_size=1, max_size=12)
FEW_SEQUENCES = st.lists(st.sampled_from(["MK", "GG", "MKTAY", "W"]) | SEQUENCES, min_size=1)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "a.fasta"


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
        patch.setattr(fasta, "WINDOW_RECORDS", window_records)
        patch.setattr(fasta, "WINDOW_RESIDUES", window_residues)
        patch.setattr(fasta, "_CHUNK", chunk)
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


def test_preflight_takes_few_bytes_a_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "_CHUNK", 1 << 10)
    records = 100_000
    # Every sequence another one: the digits of a number as residues.
    digits = str.maketrans("0123456789", "ACDEFGHIKL")
    path.write_text("".join(f">r{i}\n{str(i).translate(digits)}\n" for i in range(records)))
    inputs = rules(path)
    tracemalloc.start()
    inventory = preflight(inputs)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert inventory.records == records
    assert most < 60 * records
    assert kept < 15 * records


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


@settings(deadline=None)
@given(kind=st.sampled_from(list(COMPRESS)), data=st.data())
def test_any_damage_to_compression_is_survived_or_refused_in_one_line(
    scratch: Path, kind: str, data: st.DataObject
) -> None:
    content = bytearray(COMPRESS[kind](b">a some protein\nMKTAYIAKQRQISFVK\n>b\nGG\n" * 3))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content += data.draw(st.binary(max_size=4))
    try:
        read(scratch.with_name(f"a.{kind}"), bytes(content))
    except LedgerError as error:
        assert error.exit_status == 2
        assert len(str(error).splitlines()) == 1
