"""FASTA files made for a test: written, read by the rules of [input], or refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import strategies as st

from lib.errors import InputError
from lib.sequences.alphabet import LETTERS
from lib.sequences.inputs import input_sources
from lib.sequences.inventory import preflight
from lib.sequences.records import Record, read_file
from lib.settings import load_settings
from schema.settings import InputSettings

CHECKSUM = zstd.CompressionParameter.checksum_flag
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstd.compress(content, options={CHECKSUM: 1}),
}
UNKNOWN = "'{}' at residue {} is not in the ESM-2 alphabet"
# Of letters that the setting lets be read as X.
UNKNOWN_LETTER = f"{UNKNOWN} (input.unknown_residues)"
SEQUENCES = st.text(LETTERS.decode(), min_size=1, max_size=12)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proteins.fasta"


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "a.fasta"


def rules(path: Path, **options: object) -> InputSettings:
    said = _said(**{f"input.{name}": str(value) for name, value in options.items()})
    return replace(said, fasta=[str(path.absolute())])


@cache
def _said(**overrides: str) -> InputSettings:
    """[input] but for the file: reading config.ini takes longer than reading a small FASTA."""
    return load_settings(overrides=overrides).input


def read(path: Path, content: str | bytes, **options: object) -> list[Record]:
    # A file that is emptied and written again is on the disk when it is closed, a new one is not.
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return records_of(rules(path, **options))


def records_of(rules: InputSettings) -> list[Record]:
    """The records of an input of one file."""
    (source,) = input_sources(rules)
    return [one for batch in read_file(source, rules, 0, several=False) for one in batch]


def swap(path: Path, content: bytes) -> None:
    """Write other content of the same size into a file, and put its modification time back."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


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
