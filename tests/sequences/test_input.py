"""docs/input.md, row by row: if this fails, a user's odd file is not treated as the page says."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from lib.sequences import inventory as inventories
from lib.sequences import records
from lib.sequences.inventory import Inventory
from tests.conftest import ROOT, Script
from tests.reference import read_run

GOOD = b">a one\nMKTAY\n>b\nGG\n"
AS_GOOD = [("a", "one", 5), ("b", "", 2)]
CHECKED: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}

Change = Callable[[pytest.MonkeyPatch, Path], None]


def flipped(content: bytes, place: int) -> bytes:
    """The content with one bit of one byte the other way."""
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def being_written(patch: pytest.MonkeyPatch, path: Path) -> None:
    """A record comes in while preflight reads."""
    path.write_bytes(GOOD)
    read = records.read_file

    def read_while_it_grows(*args: Any, several: bool) -> Iterator[list[records.Record]]:  # noqa: ANN401
        yield from read(*args, several=several)
        with path.open("ab") as end:
            end.write(b">c\nMK\n")

    patch.setattr(inventories, "read_file", read_while_it_grows)


def changing_after_preflight(patch: pytest.MonkeyPatch, path: Path) -> None:
    path.write_bytes(GOOD)
    preflight = inventories.preflight

    def preflight_then_change(*args: Any, **named: Any) -> Inventory:  # noqa: ANN401
        inventory = preflight(*args, **named)
        path.write_bytes(GOOD.replace(b"GG", b"GA"))
        return inventory

    patch.setattr("scripts.embed.preflight", preflight_then_change)


# What each row of the page is tried with: the file's bytes, or what makes it.
INPUTS: dict[str, bytes | list[bytes] | Change] = {
    "lines that end in CRLF": GOOD.replace(b"\n", b"\r\n"),
    "lines that end in CR (old Mac)": GOOD.replace(b"\n", b"\r"),
    "a UTF-8 byte order mark": b"\xef\xbb\xbf" + GOOD,
    "no line end at the end": GOOD.rstrip(),
    "blank lines, blanks around lines": b"\n >a one\t\n\n MKT\nAY \n\n>b\n \nGG\n\n",
    "lines that begin with `;`": b"; list\n>a one\n;\nMKT\n; more\nAY\n>b\nGG\n;",
    "sequences wrapped at any width": [
        b">a one\n" + b"\n".join(b"MKTAY"[i : i + w] for i in range(0, 5, w)) + b"\n>b\nGG\n"
        for w in range(1, 6)
    ],
    "lower case": b">a one\nmktay\n>b\nGg\n",
    "one `*` at the end of a sequence": b">a one\nMKTAY*\n>b\nGG\n*\n",
    "a sequence of 100,000 residues": b">a\n" + b"M" * 100_000 + b"\n",
    "a header of 10 MB": b">a " + b"x" * 10_000_000 + b"\nMK\n",
    "a header with letters beyond ASCII (UTF-8)": ">蛋白 α\nMK\n".encode(),
    "the id `sp|P62593|BLAT_ECOLX`": b">sp|P62593|BLAT_ECOLX\nMK\n",
    "the id `../../etc/passwd`": b">../../etc/passwd\nMK\n",
    "the header `a'; drop table runs;--`": b">a'; drop table runs;--\nMK\n",
    "the id `=cmd()`": b">=cmd()\nMK\n",
    "nucleotide sequences": b">a one\nACGTN\n>b\nGC\n",
    "rows of an alignment": b">a one\nMK-AY\n>b\nG.\n",
    "gzip, bzip2, xz or zstd, whatever the name": [
        compress(GOOD) for compress in (gzip.compress, bz2.compress, lzma.compress, zstd.compress)
    ],
    "several compressed streams in a file": [
        compress(GOOD[:13]) + compress(GOOD[13:])
        for compress in (gzip.compress, bz2.compress, lzma.compress, zstd.compress)
    ],
    "a space within a sequence": b">a\nMK\n>b\nG G\n",
    "a tab within a sequence": b">a\nMK\n>b\nG\tG\n",
    "a digit within a sequence": b">a\nMK\n>b\nG60G\n",
    "a line that begins with `#`, within a sequence": b">a\nMK\n>b\nG\n#G\n",
    "a line that begins with `#`, before the first header": b"# made by hand\n" + GOOD,
    "a NUL byte within a sequence": b">a\nMK\n>b\nG\0G\n",
    "a NUL byte in a header": b">a\nMK\n>b\0\nGG\n",
    "a header that is not UTF-8": b">a\nMK\n>prot\xe9ine\nGG\n",
    "`>` alone": b">a\nMK\n>\nGG\n",
    "no `>` at all": b"MKTAY\nGG\n",
    "an empty file": [b"", b"\n\r\n \n", b";\n"],
    "an empty sequence": [b">a\nMK\n>b\n", b">a\nMK\n>b\n\n>c\nMK\n", b">a\nMK\n>b\n*\n"],
    "an id that appears twice": b">a\nMK\n>a two\nGG\n",
    "FASTQ": b"@a\nMKTAY\n+\nIIIII\n",
    "a PDF": b"%PDF-1.7\n%\xb5\xed\xae\xfb\n1 0 obj\n",
    "UTF-16": b"\xff\xfe" + GOOD[:2].decode().encode("utf-16-le") + b"\n\0",
    "gzip, truncated": gzip.compress(GOOD)[:-5],
    "bzip2, truncated": bz2.compress(GOOD)[:-5],
    "xz, truncated": lzma.compress(GOOD)[:20],
    "zstd, truncated": zstd.compress(GOOD)[:-5],
    "gzip, one bit flipped": flipped(gzip.compress(GOOD), -6),
    "bzip2, one bit flipped": flipped(bz2.compress(GOOD), 12),
    "xz, one bit flipped": flipped(lzma.compress(GOOD), 30),
    "zstd, one bit flipped": flipped(zstd.compress(GOOD, options=CHECKED), -2),
    "other bytes behind a compressed stream": bz2.compress(GOOD) + b"BZ?",
    "a folder without FASTA files": lambda _, path: path.mkdir(),
    "a FIFO, a device": lambda _, path: os.mkfifo(path),
    "no such file": lambda _, path: path.unlink(missing_ok=True),
    "a file that is being written": being_written,
    "a file that changes between preflight and embedding": changing_after_preflight,
}
# What the run holds after it: (id, description, length), if not the records of GOOD.
RECORDS: dict[str, list[tuple[str, str, int]]] = {
    "a sequence of 100,000 residues": [("a", "", 100_000)],
    "a header of 10 MB": [("a", "x" * 10_000_000, 2)],
    "a header with letters beyond ASCII (UTF-8)": [("蛋白", "α", 2)],
    "the id `sp|P62593|BLAT_ECOLX`": [("sp|P62593|BLAT_ECOLX", "", 2)],
    "the id `../../etc/passwd`": [("../../etc/passwd", "", 2)],
    "the header `a'; drop table runs;--`": [("a';", "drop table runs;--", 2)],
    "the id `=cmd()`": [("=cmd()", "", 2)],
}
ROWS = [
    tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:4])
    for line in (ROOT / "docs/input.md").read_text().split("## Several files")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| input ")
]


def test_the_page_has_every_input_once() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(INPUTS)


@pytest.mark.parametrize(("what", "happens", "status"), ROWS, ids=[row[0] for row in ROWS])
def test_an_input_gets_what_the_page_says(
    script: Script,
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    happens: str,
    status: str,
) -> None:
    made = INPUTS[what]
    path = tmp_path / "proteins.fasta"
    for number, content in enumerate(made if isinstance(made, list) else [made], 1):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(monkeypatch, path)
        answer = script("embed", "--esm-model", small_model, "--input", path)
        assert answer.status == int(status), answer.err
        if answer.status:
            fact = re.findall(r"`(.+)`", happens)[0].replace("\\\\", "\\")
            error = answer.error.replace(str(path), "FILE")
            assert error.startswith(fact) if "…" in happens else error == fact
        else:
            rows: dict[int, Any] = read_run(tmp_path / f"embeddings/run-{number:06d}")
            found = [
                (row["id"], row["description"], row["length"]) for _, row in sorted(rows.items())
            ]
            assert found == RECORDS.get(what, AS_GOOD)
            for warning in re.findall(r"warned: `(.+)`", happens):
                assert warning in answer.err.splitlines()
