"""Compressed FASTA: if these fail, a damaged file loses records in silence."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError, LedgerError
from lib.sequences.inventory import preflight
from tests.conftest import UNIPROT_PART, Script
from tests.sequences.conftest import COMPRESS, read, records_of, refusal, rules, told


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("named", [True, False])
def test_compressed_files_are_read(tmp_path: Path, kind: str, named: bool) -> None:
    path = tmp_path / (f"a.fasta.{kind}" if named else "a.fasta")
    path.write_bytes(COMPRESS[kind](UNIPROT_PART.read_bytes()))
    plain = records_of(rules(UNIPROT_PART))
    assert records_of(rules(path)) == plain
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
        for bit in range(named, 8, 2):  # the other bits without or with a name
            damage = bytes([whole[place] ^ 1 << bit])
            try:
                assert read(path, whole[:place] + damage + whole[place + 1 :]) == records
            except InputError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > len(whole) * 4 // 2


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("behind", [b"x", b"junk", b"BZh", b">z\nMK\n", b"\x1f\x8b"])
def test_bytes_behind_the_last_stream_are_refused(tmp_path: Path, kind: str, behind: bytes) -> None:
    refusal(tmp_path / f"a.{kind}", COMPRESS[kind](b">a\nMK\n") + behind)


@pytest.mark.parametrize(
    ("kind", "zeros", "is_padding"),
    [
        ("gz", 3, True),
        ("xz", 4, True),
        ("xz", (1 << 18) + 4, True),
        ("xz", 3, False),
        ("xz", (1 << 18) + 1, False),
        ("bz2", 4, False),
        ("zst", 4, False),
    ],
)
def test_zeros_between_and_behind_streams_are_padding_as_the_format_says(
    tmp_path: Path, kind: str, zeros: int, is_padding: bool
) -> None:
    """Before, xz refused what `xz --test` calls good."""
    path, padding = tmp_path / f"a.fasta.{kind}", bytes(zeros)
    first, second = map(COMPRESS[kind], (b">a\nMK\n", b">b\nGG\n"))
    for content in (first + padding, first + padding + second + padding):
        if is_padding:
            assert len(read(path, content)) == 1 + (len(content) > len(first + padding))
        else:
            refusal(path, content)


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta.gz"
    records = read(path, gzip.compress(b">a\nMK\n") + gzip.compress(b">b\nGG\n"))
    assert [record.id for record in records] == ["a", "b"]


def test_a_name_that_promises_compression_is_refused_without_it(tmp_path: Path) -> None:
    for kind in COMPRESS:
        refusal(tmp_path / f"a.fasta.{kind}", ">a\nMK\n>b\nGG\n")


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
