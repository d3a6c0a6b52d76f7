"""Verified files: checkpoint files read only as long as they are those that were checked.

A run can have more files than a process may hold open. So each is opened once to be checked, footer
and digest through one descriptor, and opened again to be read; it is then refused unless device,
inode, size, mtime and ctime are still those of the descriptor that was checked. Nobody can put a
ctime back without setting the clock.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import IdentityRefusedError
from lib.files import disk_errors, do_not_keep
from lib.ledger.footer import footer_of, read_footer

__all__ = ["ListedFile", "OpenedFile", "VerifiedFile", "verified_file"]

_BLOCK = 1 << 20
# Of a column that is read, beside the page that is decoded: Arrow would read all of a row group.
_READ_AHEAD = 1 << 18
_BATCH_BYTES = 1 << 21
Stamp = tuple[int, int, int, int, int]  # device, inode, size, mtime_ns, ctime_ns


@dataclass(frozen=True)
class ListedFile:
    """A checkpoint file as the database lists it.

    run: the row of its run, by column; columns: those of the run; records: rows in the file;
    copied: whether its rows are of an earlier run.
    """

    run: Mapping[str, Any]
    path: Path
    bytes: int
    sha256: str
    columns: pa.Schema
    records: int
    copied: bool = False

    @property
    def place(self) -> str:
        """The run and the path, as an error names them."""
        return f"run {self.run['id']}: {self.path}"


@dataclass(frozen=True)
class VerifiedFile:
    """A checkpoint file that is what the database lists; `stamp` is that of what was checked."""

    listed: ListedFile
    stamp: Stamp

    @contextmanager
    def opened(self) -> Iterator[OpenedFile]:
        """Open the file to read its rows.

        Raises IdentityRefusedError if it is not the file that was checked, MachineError if the disk
        fails.
        """
        with _opened(self.listed) as file:
            self.refuse_if_changed(file)
            yield OpenedFile(self, file)

    def copy(self, to: Path) -> None:
        """Copy the file to `to`.

        Raises IdentityRefusedError unless the copy has the SHA-256 that the database lists,
        MachineError if the file cannot be read, OSError if `to` cannot be written.
        """
        digest = hashlib.sha256()
        with to.open("wb") as copy:
            for block in self._blocks():
                digest.update(block)
                copy.write(block)
        if digest.hexdigest() != self.listed.sha256:
            raise IdentityRefusedError(f"{self.listed.place}: sha256 differs from the database")

    def _blocks(self) -> Iterator[bytes]:
        # The caller's errors do not pass through here, so that this file is not blamed for them.
        with _opened(self.listed) as file:
            while block := file.read(_BLOCK):
                yield block

    def refuse_if_changed(self, file: BufferedReader) -> None:
        """Raise IdentityRefusedError unless an opened file is the one that was checked, as it was.

        A file that changes while it is read is refused by another call after that.
        """
        if _stamp(file) != self.stamp:
            raise IdentityRefusedError(f"{self.listed.place}: changed since it was checked")


class OpenedFile:
    """The rows of a checkpoint file, read through the descriptor that was compared."""

    def __init__(self, verified: VerifiedFile, file: BufferedReader) -> None:
        self._verified, self._file = verified, file
        # No thread of Arrow may call a Python file: one that does when the process ends aborts it
        # (https://github.com/apache/arrow/issues/34314). pre_buffer has threads of its own.
        with _read_errors(verified.listed):
            self._parquet = pq.ParquetFile(
                file, page_checksum_verification=True, buffer_size=_READ_AHEAD, pre_buffer=False
            )

    @property
    def columns(self) -> pa.Schema:
        """The columns, as the footer names them."""
        with _read_errors(self._verified.listed):
            return self._parquet.schema_arrow

    @property
    def row_groups(self) -> range:
        """The numbers of the row groups."""
        return range(self._parquet.num_row_groups)

    @property
    def row_counts(self) -> list[int]:
        """How many rows each row group has."""
        metadata = self._parquet.metadata
        return [metadata.row_group(group).num_rows for group in self.row_groups]

    def footer(self) -> dict[str, Any]:
        """Return what the ledger wrote into the footer; raises ValueError as `footer_of` does."""
        return footer_of(self._parquet.metadata.metadata)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of a row group.

        Raises IdentityRefusedError if the file has changed meanwhile, or its pages are not whole.
        """
        with _read_errors(self._verified.listed):
            table = self._parquet.read_row_group(group, columns=[*columns], use_threads=False)
        self._verified.refuse_if_changed(self._file)
        return table

    def batches(self, group: int, columns: Sequence[str], most_rows: int) -> Iterator[pa.Table]:
        """Yield columns of a row group, at most so many rows or about 2 MB at once.

        Raises IdentityRefusedError if the file has changed meanwhile, or its pages are not whole.
        """
        there = self._parquet.metadata.row_group(group)
        chunks = [there.column(number) for number in range(there.num_columns)]
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] in columns
        )
        rows = max(1, min(most_rows, there.num_rows * _BATCH_BYTES // max(1, size)))
        # Without threads, of which each would keep what it has freed.
        batches = self._parquet.iter_batches(rows, [group], [*columns], use_threads=False)
        while True:
            with _read_errors(self._verified.listed):
                batch = next(batches, None)
            if batch is None:
                return
            self._verified.refuse_if_changed(self._file)
            yield pa.Table.from_batches([batch])


def verified_file(listed: ListedFile, *, digest: bool) -> VerifiedFile:
    """Check that a file has the listed size, and that its footer names its run, the columns of the
    run and the listed number of records; no row is read.

    digest: whether its SHA-256 is to be compared too. Raises IdentityRefusedError at the first
    difference, MachineError if the disk fails.
    """
    with _opened(listed) as file:
        verified = VerifiedFile(listed, _stamp(file))
        size = verified.stamp[2]
        if size != listed.bytes:
            raise IdentityRefusedError(
                f"{listed.place}: {size} bytes, {listed.bytes} in the database"
            )
        if digest and hashlib.file_digest(file, "sha256").hexdigest() != listed.sha256:
            raise IdentityRefusedError(f"{listed.place}: sha256 differs from the database")
        _check_footer(listed, file)
        _check_rows(listed, OpenedFile(verified, file))
        verified.refuse_if_changed(file)
    return verified


def _check_footer(listed: ListedFile, file: BufferedReader) -> None:
    try:
        identity = read_footer(listed.path, file).get("identity")
    except ValueError as error:
        raise IdentityRefusedError(f"{listed.place}: {error}") from None
    if not isinstance(identity, dict):
        raise IdentityRefusedError(f"{listed.place}: footer has no identity")
    for key in ("uuid", "esm2_config", "input_sha256"):
        if identity.get(key) != listed.run[key]:
            raise IdentityRefusedError(
                f"{listed.place}: {key} in its footer differs from the database"
            )


def _check_rows(listed: ListedFile, opened: OpenedFile) -> None:
    if not opened.columns.equals(listed.columns):
        raise IdentityRefusedError(f"{listed.place}: its columns are not those of the run")
    records = sum(opened.row_counts)
    if records != listed.records:
        raise IdentityRefusedError(
            f"{listed.place}: {records} records, {listed.records} in the database"
        )


@contextmanager
def _read_errors(listed: ListedFile) -> Iterator[None]:
    """Refuse a file that Arrow cannot read; errors of the system and of the memory pass."""
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # What Arrow finds wrong with a file is an OSError, too, but has no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fact = " ".join(str(error).split())[:200]
        raise IdentityRefusedError(f"{listed.place}: {fact}") from None


@contextmanager
def _opened(listed: ListedFile) -> Iterator[BufferedReader]:
    """Open a regular file, not a link; errors of the system and of Arrow become a MachineError."""
    with disk_errors(listed.path):
        # Opening a FIFO would wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        if listed.path.is_symlink() or not listed.path.is_file():
            raise IdentityRefusedError(f"{listed.place}: no such regular file")
        with os.fdopen(os.open(listed.path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise IdentityRefusedError(f"{listed.place}: no such regular file")
            do_not_keep(file)
            yield file


def _stamp(file: BufferedReader) -> Stamp:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
