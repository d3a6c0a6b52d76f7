"""Preflight: if this fails, a faulty input is found after hours of work, or counts are wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.sequences import digests, entries
from lib.sequences import inventory as inventories
from lib.sequences.compression import DigestedRead, open_decompressed
from lib.sequences.inventory import preflight
from tests.conftest import UNIPROT_PART, Place, Script
from tests.sequences.conftest import COMPRESS, UNKNOWN_LETTER, refusal, rules, swap


@pytest.mark.parametrize("content", ["", "\n", "\r\n \n"])
def test_a_file_without_records_is_refused(path: Path, content: str) -> None:
    assert refusal(path, content) == "no records"


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda _: None, "no such file"),
        (lambda path: path.mkdir(), "no FASTA file in this folder (.fasta .fa .faa .fas .pep)"),
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
    assert answer.error == "no input: [input] fasta is empty and no --input (make INPUT=) was given"


def test_input_is_refused_before_the_model_is_loaded(
    script: Script, place: Place, path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("scripts.embed.made_ready")
    path.write_text(">a\nMJ\n")
    answer = script("embed", "--esm-model", small_model, "--input", path)
    assert (answer.status, answer.error) == (2, f"record 0 (a): {UNKNOWN_LETTER.format('J', 2)}")
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
    assert "truncated to 20 residues: 1 record" in lines
    assert "unknown letters read as X: 2" in lines
    assert "only letters of ACGTUN (nucleotides?): 1 record" in lines


def test_genes_and_rows_of_an_alignment_are_counted_and_warned_of(
    script: Script, place: Place, path: Path, small_model: Path
) -> None:
    """ESM-2 has letters for all that a gene is written with, and for gaps."""
    sequences = ["ACGTN", "acgu", "ACGTM", "AC-GT", "MK..TAY", "---", "MKTAY", "ACGTACGT"]
    path.write_text("".join(f">r{i}\n{one}\n" for i, one in enumerate(sequences)))
    inventory = preflight(rules(path))
    assert (inventory.nucleotide_like, inventory.with_gaps) == (4, 3)
    answer = script("embed", "--esm-model", small_model, "--input", path)
    assert "only letters of ACGTUN (nucleotides?): 4 records" in answer.err.splitlines()
    assert "gaps, - or . (an alignment?): 3 records" in answer.err.splitlines()
    found = script("validate", "--esm-model", small_model, "--input", path, "--json").json["input"]
    assert (found["nucleotide_like"], found["with_gaps"]) == (4, 3)
    counted = "select records_nucleotide_like, records_with_gaps from runs"
    assert script("query", counted, "--format", "csv").out.endswith("\n4,3\n")
    text = script("history", "--run", "1").out
    assert re.search(r"^only ACGTUN +4 records$", text, re.MULTILINE)
    assert re.search(r"^with gaps \(- or \.\) +3 records$", text, re.MULTILINE)
    place.set("output", "reuse", "yes")
    path.write_text(">a\nMKTAY\n")
    assert script("embed", "--esm-model", small_model, "--input", path).status == 0
    text = script("history", "--run", "2").out
    assert "ACGTUN" not in text
    assert "gaps" not in text


def test_what_is_embedded_decides_whether_it_is_suspect(path: Path) -> None:
    path.write_text(">a\nACGTMK\n>b\nMKTA--\n")
    inventory = preflight(rules(path, max_residues="4"))
    assert (inventory.nucleotide_like, inventory.with_gaps) == (1, 0)


# ---- Repeated ids


def test_repeated_ids_are_refused(path: Path) -> None:
    content = ">a\nMK\n>b\nMK\n>c\nMK\n>b other\nMKT\n>a\nMK\n"
    assert refusal(path, content) == "record 3 (b): id repeats record 1's (input.duplicate_ids)"


def test_ids_are_compared_by_more_than_their_hashes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 bits are equal by chance in one of 3,700 files of a hundred million records."""
    monkeypatch.setattr(inventories, "hash", len, raising=False)
    path.write_text(">aa\nMK\n>bb\nMK\n>c\nMK\n>dd\nMK\n")
    assert preflight(rules(path)).records == 4
    content = ">aa\nMK\n>bb\nMK\n>c\nMK\n>bb\nMK\n>aa\nMK\n"
    assert refusal(path, content) == "record 3 (bb): id repeats record 1's (input.duplicate_ids)"


def test_repeated_ids_are_kept_if_asked(path: Path) -> None:
    path.write_text(">a\nMK\n>a\nMKT\n")
    inventory = preflight(rules(path, duplicate_ids="keep"))
    assert (inventory.records, inventory.sequences) == (2, 2)


def test_ids_that_differ_in_case_are_not_repeated(path: Path) -> None:
    path.write_text(">a\nMK\n>A\nMKT\n>é\nGG\n>\u0065\u0301\nGGG\n")
    assert preflight(rules(path)).records == 4


# ---- The digest


@pytest.mark.parametrize("kind", [None, *COMPRESS])
def test_the_digest_is_of_the_bytes_that_were_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    """The file is swapped as it is opened for parsing, size and mtime put back.

    When the digest was taken in a read before, it was that of the other content.
    """
    path = tmp_path / "a.fasta"
    one, other = same_size(COMPRESS[kind] if kind else bytes)
    path.write_bytes(one)

    def swapped_as_it_is_opened(
        file: Path, read: DigestedRead | None
    ) -> gzip.GzipFile | io.BufferedReader:
        swap(path, other)
        return open_decompressed(file, read)

    monkeypatch.setattr(entries, "open_decompressed", swapped_as_it_is_opened)
    inventory = preflight(rules(path))
    assert inventory.residues == 8 + 3
    assert inventory.sha256 == hashlib.sha256(other).hexdigest()
    assert inventory.bytes == len(other)


def same_size(compress: Callable[[bytes], bytes]) -> tuple[bytes, bytes]:
    """Two files of two and of three residues in their second record, compressed to one size."""
    files: dict[int, dict[int, bytes]] = {2: {}, 3: {}}
    for tail in range(40):
        for residues in (2, 3):
            header = b">b " + bytes(range(97, 97 + tail % 20)) + b"x" * (tail // 20)
            content = compress(b">a\nMKTAYIAK\n" + header + b"\n" + b"GYW"[:residues] + b"\n")
            files[residues][len(content)] = content
    size = min(files[2].keys() & files[3].keys())
    return files[2][size], files[3][size]


@pytest.mark.parametrize("kind", [None, *COMPRESS])
@pytest.mark.parametrize("named", [True, False])
def test_the_digest_is_that_of_the_stored_file(
    tmp_path: Path, kind: str | None, named: bool
) -> None:
    path = tmp_path / (f"a.fasta.{kind}" if named else "a.fasta")
    content = UNIPROT_PART.read_bytes()
    # Several streams, the last of them behind a block that was read at once.
    half = len(content) // 2
    parts = [content[:half], content[half:]]
    path.write_bytes(b"".join(COMPRESS[kind](part) if kind else part for part in parts))
    inventory = preflight(rules(path))
    assert inventory.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert inventory.bytes == path.stat().st_size


def test_a_file_that_was_not_read_to_its_end_has_no_digest(path: Path) -> None:
    path.write_text(">a\nMK\n")
    read = DigestedRead(path)
    with pytest.raises(ValueError, match="not read to its end"):
        read.sha256()
    with read.open() as opened:
        opened.read(2)
    with pytest.raises(ValueError, match="not read to its end"):
        read.sha256()


# ---- Memory


def test_preflight_takes_few_bytes_a_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_CHUNK", 1 << 10)
    monkeypatch.setattr(entries, "_PIECE", 1 << 12)
    records = 50_000
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
