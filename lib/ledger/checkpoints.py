"""Checkpoint files: one Parquet file per stretch of the plan, whole under its name or not there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.arrow import arrow_array
from lib.columns import Vectors
from lib.files import disk_errors, do_not_keep
from lib.parts import bounded_parts
from lib.sequences.describing import describe_owners, owner_index
from lib.sequences.windows import Sequence as FastaSequence
from schema.parquet import EMBEDDED_SHA256, FOOTER_KEY

__all__ = [
    "ROW_GROUP_BYTES",
    "CheckpointWriter",
    "FinishedFile",
    "FinishedStretch",
    "attempt_of",
    "checkpoint_name",
    "checkpoint_number",
    "leftovers",
    "row_group_slices",
    "temporary_name",
]

# Rows are held back until they are worth a row group of this many bytes; writing one takes as much
# again. Readers are no slower than with groups that are four times as large.
ROW_GROUP_BYTES = 8 << 20
_NAME = re.compile(r"checkpoint-(\d{6,})\.parquet")
# The second form is that of versions before the attempt was part of the name.
_TEMPORARY = re.compile(
    r"\.(?:attempt-(\d+)-[\d.]+(?:-by-[0-9a-f]+)?[\d.]*|checkpoint-\d{6})\.parquet\.tmp"
)


@dataclass(frozen=True)
class FinishedFile:
    """A checkpoint that is on disk under a temporary name, complete and synced.

    inode: device and inode of the file that was written and digested.
    """

    temporary: Path
    inode: tuple[int, int]
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FinishedStretch:
    """Computed work in a finished file that the database does not list yet.

    positions: places in the plan. residues: computed for it. seconds: wall time it took.
    reused_run_id: the run that its rows were copied from, None if they were computed;
    residues_reused: of the sequences that were copied. worker_id:
    the row of the worker that computed it; None if this process did.
    """

    file: FinishedFile
    positions: range
    residues: int
    seconds: float
    reused_run_id: int | None = None
    residues_reused: int | None = None
    worker_id: int | None = None


class CheckpointWriter:
    """Writes one checkpoint under a temporary name; nothing is seen of it before it is whole."""

    def __init__(
        self, folder: Path, name: str, columns: pa.Schema, footer: Mapping[str, Any]
    ) -> None:
        self._columns = columns
        self._footer = footer
        self._rows: list[pa.RecordBatch] = []
        self._held = 0
        self.records = 0
        vectors = {field.name for field in columns if pa.types.is_nested(field.type)}
        with disk_errors(folder / name):
            self._temporary, self._file = _open_new(folder, name)
            do_not_keep(self._file)  # it is read for its digest
            self._writer = pq.ParquetWriter(
                self._file,
                columns,
                use_dictionary=False,
                # Floats and digests do not shrink, and take time.
                compression={
                    name: "none" if name in {*vectors, EMBEDDED_SHA256} else "zstd"
                    for name in columns.names
                },
                write_statistics=["record", "length", "embedded_length"],
                write_page_checksum=True,
                store_schema=True,
            )

    def add(self, sequences: Sequence[FastaSequence], vectors: Vectors) -> None:
        """Append a row for every owner of every sequence."""
        index, owners = owner_index(sequences), describe_owners(sequences)
        sizes = np.zeros(len(sequences), np.int64)
        for column in vectors.columns.values():
            sizes += [vector.nbytes for vector in column]
        for rows in row_group_slices(sizes[index]):
            part = owners.slice(rows.start, rows.stop - rows.start)
            self.add_rows(_rows(self._columns, part, index[rows], vectors))

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Append rows that have the columns of the file."""
        self._rows.append(rows)
        self._held += rows.nbytes
        self.records += rows.num_rows
        if self._held >= ROW_GROUP_BYTES:
            self._flush()

    def finish(
        self,
        positions: range,
        residues: int,
        seconds: float,
        reused: Mapping[str, Any] | None = None,
    ) -> FinishedFile:
        """Close and sync the file; it keeps its temporary name until it is committed.

        reused: what its footer tells of the run that its rows were copied from, if they were.
        The digest is taken through the descriptor that wrote the file, so that it is of these
        bytes, whatever has become of the name.
        """
        self._flush()
        footer = {
            **self._footer,
            "first_position": positions.start,
            "stop_position": positions.stop,
            "records": self.records,
            "residues": residues,
            "seconds": round(seconds, 3),
            **({} if reused is None else {"reused": reused}),
        }
        with disk_errors(self._temporary):
            self._writer.add_key_value_metadata({FOOTER_KEY: json.dumps(footer).encode()})
            self._writer.close()
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found = os.fstat(file.fileno())
        inode = found.st_dev, found.st_ino
        return FinishedFile(self._temporary, inode, self.records, found.st_size, digest)

    def discard(self) -> None:
        """Remove what was written of an unfinished checkpoint."""
        # The file is given up: what closing it on a full disk says is of no more interest.
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._rows:
            return
        # Arrow's allocator keeps what was freed, once more than is held: of the rows before they
        # are written, and of all that has been written.
        pool = pa.default_memory_pool()
        pool.release_unused()
        with disk_errors(self._temporary):
            self._writer.write_table(pa.Table.from_batches(self._rows, self._columns))
        self._rows, self._held = [], 0
        pool.release_unused()


def temporary_name(attempt_id: int, first_position: int, token: str = "") -> str:
    """Return the name under which an attempt writes the stretch that begins at a position.

    token: hexadecimal digits that tell apart what several workers write for the attempt.
    """
    by = f"-by-{token}" if token else ""
    return f".attempt-{attempt_id}-{first_position}{by}.parquet.tmp"


def attempt_of(name: str) -> int | None:
    """Return the attempt in a temporary file's name; 0 in names older than it, None in others."""
    match = _TEMPORARY.fullmatch(name)
    return int(match[1] or 0) if match else None


def _open_new(folder: Path, name: str) -> tuple[Path, io.BufferedRandom]:
    """Make a file that no other process has, under `name` or a name like it."""
    for number in itertools.count(1):
        path = folder / name
        try:
            return path, path.open("x+b")
        except FileExistsError:  # left by an attempt that this database does not know
            name = f"{name.split('.parquet')[0]}.{number}.parquet.tmp"
    raise AssertionError("unreachable")


def checkpoint_name(number: int) -> str:
    """Return the file name of a run's checkpoint."""
    return f"checkpoint-{number:06d}.parquet"


def checkpoint_number(name: str) -> int | None:
    """Return the number in a checkpoint's file name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def leftovers(folder: Path, listed: set[str]) -> list[Path]:
    """Return files of interrupted work in a run's folder: ours by name, not in the database."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if attempt_of(path.name) is not None
        or (checkpoint_number(path.name) is not None and path.name not in listed)
    )


def row_group_slices(sizes: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Yield rows in parts of about a row group: a sequence may have thousands of owners.

    sizes: (rows,) bytes of the vectors of each.
    """
    for part in bounded_parts(sizes, ROW_GROUP_BYTES):
        yield slice(part.start, part.stop)


def _rows(
    columns: pa.Schema,
    owners: pa.RecordBatch,
    index: npt.NDArray[np.int64],
    vectors: Vectors,
) -> pa.RecordBatch:
    """Return the Arrow rows of records.

    owners: what describes them; index: (records,) the sequence of each.
    """
    arrays: dict[str, pa.Array] = dict(zip(owners.schema.names, owners.columns, strict=True))
    for kept, column in vectors.columns.items():
        name = str(kept)
        kind = columns.field(name).type
        if isinstance(column, list):
            offsets = np.zeros(len(index) + 1, dtype=np.int32)
            np.cumsum([column[i].size for i in index], out=offsets[1:])
            flat = np.concatenate([column[i].ravel() for i in index])
            starts, values = arrow_array(offsets, pa.int32()), arrow_array(flat, kind.value_type)
            arrays[name] = pa.ListArray.from_arrays(starts, values, type=kind)
        else:
            values = arrow_array(column[index].ravel(), pa.float32())
            arrays[name] = pa.FixedSizeListArray.from_arrays(values, type=kind)
    return pa.RecordBatch.from_arrays([arrays[name] for name in columns.names], schema=columns)
