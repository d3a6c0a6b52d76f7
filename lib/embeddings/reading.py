"""Embeddings read back: a run's vectors in FASTA order, in bounded memory and without torch.

    from lib.embeddings import open_run

    run = open_run("runs.sqlite", 1)
    run.ids, run.matrix()              # (N,) and (N, hidden_dim) float32, in FASTA order
    run.input_files                    # (N,) the FASTA file that each record is from
    run.matrix(to="vectors.npy")       # the same, memory-mapped
    run.residues(7)                    # (embedded_length, hidden_dim) of record 7
    run.contacts(7)                    # (embedded_length, embedded_length) of record 7

Rows are stored in the order of the plan, longest first within a window. They are read once, one row
group at a time, and each goes to its place in FASTA order. Memory holds one row group and the
number of every record.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.arrow import arrow_array, numbers, retyped
from lib.embeddings.verified import ListedFile, VerifiedFile, verified_file
from lib.errors import IdentityRefusedError, SettingsError
from lib.files import new_path
from lib.ledger.footer import is_compiled
from lib.ledger.history import altered_rows, query, refuse_pruned
from lib.ledger.ownership import shown_status
from lib.ledger.places import StoredRun, given_folder
from lib.ledger.sqlite_file import database_path
from schema.parquet import CONTACTS, VectorColumn, checkpoint_columns

__all__ = ["RunEmbeddings", "open_run", "run_facts", "values"]

Array = npt.NDArray[Any]


def open_run(
    database: str | Path,
    run: SupportsIndex,
    *,
    partial: bool = False,
    verify: bool = False,
    output: str | Path | None = None,
) -> RunEmbeddings:
    """Open a run of a run database (a SQLite path or URL) for reading.

    Every file that the database lists must exist, have the listed size, and name the run, its
    columns and the listed number of records in its footer; with `verify` its SHA-256 must also be
    the listed one. Whatever is read later is read from the same files, or refused. `partial` opens
    an unfinished run with the records that it has.
    output: where the folder of the run lies, if it has moved away from the database.

    Raises SettingsError if the run does not exist, is not finished or is pruned, and
    IdentityRefusedError if a file differs from what the database lists, now or when it is read, or
    if `output` is of another run.
    """
    url, run = str(database), operator.index(run)  # SQLite would take an int64 of numpy for bytes
    facts = run_facts(url, run)
    refuse_pruned(run, facts["pruned_at"])
    inputs = query(
        url, "SELECT * FROM inputs WHERE run_id = ? ORDER BY number", [run]
    ).dictionaries()
    with altered_rows(url):
        folder = _locate(facts, inputs, database_path(url), output)
    facts["status"] = shown_status(facts["status"], folder)
    attempts = query(
        url, "SELECT device_name, versions FROM attempts WHERE run_id = ? ORDER BY id", [run]
    ).dictionaries()
    with altered_rows(url):
        for attempt in attempts:
            attempt["versions"] = dict(json.loads(attempt["versions"]))
    if facts["esm2_config"] is None:
        raise IdentityRefusedError(f"run {run}: no model metadata (NULL)")
    if "hidden_dim" not in facts["esm2_config"]:
        raise IdentityRefusedError(f"run {run}: model metadata lacks hidden_dim")
    listed = query(
        url,
        "SELECT path, bytes, sha256, records, reused_run_id IS NOT NULL AS copied "
        "FROM checkpoints WHERE run_id = ? ORDER BY first_position",
        [run],
    ).dictionaries()
    done = sum(one["records"] for one in listed)
    if facts["status"] != "finished" and not partial:
        raise SettingsError(
            f"run {run}: {facts['status']}, {done} of {facts['records_total']} records done"
        )
    with altered_rows(url):
        columns = checkpoint_columns(
            facts["include"],
            facts["repr_layers"],
            facts["esm2_config"]["hidden_dim"],
            facts["per_tok_dtype"],
            digests=bool(facts["has_digests"]),
        )
        files = [
            ListedFile(
                facts, folder / one["path"], one["bytes"], one["sha256"],
                columns, one["records"], bool(one["copied"]),
            )
            for one in listed
        ]  # fmt: skip
    verified = [verified_file(file, digest=verify) for file in files]
    return RunEmbeddings(facts, inputs, attempts, verified)


def run_facts(url: str, run: int) -> dict[str, Any]:
    """Return the row of a run, pruned or not, with its JSON read; no file is. `compile`, of its
    settings, is added.

    Raises SettingsError if there is none, MachineError if it has been altered.
    """
    known = 0 < run < 1 << 63  # SQLite has no other numbers
    found = query(url, "SELECT * FROM runs WHERE id = ?", [run]).dictionaries() if known else []
    if not found:
        raise SettingsError(f"run {run}: not in database {database_path(url)}")
    facts = found[0]
    with altered_rows(url):
        for name in ("esm2_config", "repr_layers", "include"):
            facts[name] = json.loads(facts[name]) if facts[name] is not None else None
        facts["compile"] = is_compiled(json.loads(facts["settings"]))
    return facts


def _locate(
    facts: dict[str, Any], inputs: list[dict[str, Any]], database: Path, output: str | Path | None
) -> Path:
    """Put the paths of today in the place of stored ones; return the folder of the run."""
    stored = StoredRun.of_row(facts)
    folder = stored.folder(database)
    if output is not None:
        folder = given_folder(stored, Path(output)).absolute()
    facts["output_folder"] = str(folder)
    for row, name in [(facts, "input_path"), *((one, "path") for one in inputs)]:
        row[name] = str(stored.path(row[name], database, folder))
    return folder


class RunEmbeddings:
    """The vectors of one run, in FASTA order; `open_run` makes it.

    facts: the row of the run in the table `runs`, by column, and `compile`, of its settings; a
        status `killed` is of a running run without a live process.
    inputs: the rows of its input files in the table `inputs`, in their order.
    attempts: device_name and versions of every attempt at it.
    files: its checkpoint files, as they were checked.
    records: (N,) int64, the position in the FASTA of every record, ascending.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        inputs: list[dict[str, Any]],
        attempts: list[dict[str, Any]],
        files: list[VerifiedFile],
    ) -> None:
        self.facts = facts
        self.inputs = inputs
        self.attempts = attempts
        self.files = files
        records, places = _find_records(files)
        order = np.argsort(records)
        self.records: npt.NDArray[np.int64] = records[order]
        # (N, 3): file, row group and row of every record, in FASTA order.
        self._places = places[order]
        self._refuse_incomplete()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def model(self) -> dict[str, Any]:
        """The ESM2Config snapshot; if `untrained` is true, the vectors mean nothing."""
        config: dict[str, Any] = self.facts["esm2_config"]
        return config

    @property
    def hidden_dim(self) -> int:
        """Width of a vector."""
        return int(self.model["hidden_dim"])

    @property
    def layers(self) -> list[int]:
        """The layers kept, ascending."""
        return sorted(self.facts["repr_layers"])

    @property
    def copied(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the vectors of each record were copied from an earlier run."""
        of_files = np.array([file.listed.copied for file in self.files], bool)
        return of_files[self._places[:, 0]]

    @cached_property
    def ids(self) -> list[str]:
        """First word of every header, in FASTA order."""
        ids: list[str] = self.table("id").column("id").to_pylist()
        return ids

    @cached_property
    def input_files(self) -> list[str]:
        """The path of the input file that each record is from, in FASTA order."""
        paths = [one["path"] for one in self.inputs]
        firsts = [one["first_record"] for one in self.inputs]
        places = np.searchsorted(firsts, self.records, side="right") - 1
        return [paths[place] for place in places.tolist()]

    def table(self, *columns: str) -> pa.Table:
        """Return columns that are not vectors (id, description, length...), in FASTA order.

        Texts are large_string: those of a run may have more than the 2 GB of Arrow's string.
        """
        parts = [table for _positions, table in self.stored(*columns)]
        if not parts:
            fields = [pa.field(name, pa.large_string()) for name in columns]
            return pa.Table.from_batches([], pa.schema(fields))
        # Places sort by file, row group and row, which is the order of the parts.
        rank = np.empty(len(self), np.int64)
        rank[np.lexsort(self._places.T[::-1])] = np.arange(len(self))
        # `take` puts the chunks of a column together first.
        table = pa.concat_tables(parts)
        large = pa.schema(retyped(table.schema, pa.string(), pa.large_string()))
        return table.cast(large).take(arrow_array(rank, pa.int64()))

    def column(self, kind: str, layer: int | None = None) -> VectorColumn:
        """Return the column of `kind` (mean, bos, per_tok) at `layer`.

        Negative layers count from the end; None is the last that was kept. Raises SettingsError
        if the run did not keep it.
        """
        self._refuse_unkept(kind)
        if layer is None:
            layer = self.layers[-1]
        counted = layer + self.model["num_layers"] + 1 if layer < 0 else layer
        if counted not in self.layers:
            kept = " ".join(map(str, self.layers))
            raise SettingsError(f"run {self.facts['id']}: layer {layer} is not kept, only {kept}")
        return VectorColumn(kind, counted)

    def matrix(
        self, kind: str = "mean", layer: int | None = None, *, to: str | Path | None = None
    ) -> npt.NDArray[np.float32]:
        """Return (N, hidden_dim) float32 in FASTA order; kind: mean or bos.

        With `to` the matrix is written to that .npy file in bounded memory and returned
        memory-mapped. Raises SettingsError if the file exists.
        """
        column = self.column(_pooled(kind), layer)
        if to is not None:
            with new_path(Path(to), folder=False) as temporary:
                self.write_matrix(column, temporary)
            mapped: npt.NDArray[np.float32] = np.load(to, mmap_mode="r")
            return mapped
        matrix = np.empty((len(self), self.hidden_dim), np.float32)
        for positions, table in self.stored(column):
            matrix[positions] = values(table.column(str(column))).reshape(-1, self.hidden_dim)
        return matrix

    def write_matrix(self, column: VectorColumn, path: Path) -> None:
        """Write a column of `mean` or `bos` to `path` as .npy, (N, hidden_dim), FASTA order."""
        shape = (len(self), self.hidden_dim)
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start, width = file.tell(), self.hidden_dim * 4
            for positions, table in self.stored(column):
                rows = values(table.column(str(column))).reshape(-1, self.hidden_dim)
                for position, row in zip(positions.tolist(), rows, strict=True):
                    _write_at(file, row, start + position * width)

    def write_residues(
        self, column: VectorColumn, path: Path
    ) -> tuple[npt.NDArray[np.int64], np.dtype[Any]]:
        """Write a column of `per_tok` to `path`, the records end to end in FASTA order.

        Returns (N + 1,) the position of each record's first value, and the type of the values.
        """
        lengths = numbers(self.table("embedded_length").column("embedded_length"))
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(lengths.astype(np.int64) * self.hidden_dim, out=starts[1:])
        dtype = np.dtype(self.facts["per_tok_dtype"])
        with path.open("wb") as file:
            for positions, table in self.stored(column):
                for position, row in zip(
                    positions.tolist(), lists(table.column(str(column))), strict=True
                ):
                    _write_at(file, row, int(starts[position]) * dtype.itemsize)
        return starts, dtype

    def residues(self, record: int, layer: int | None = None) -> Array:
        """Return (embedded_length, hidden_dim) of one record, in the type that was stored.

        record: position in the FASTA. Raises SettingsError if the run has no such record.
        """
        column = self.column("per_tok", layer)
        return self.row(record, column)[column].reshape(-1, self.hidden_dim)

    def contacts(self, record: int) -> npt.NDArray[np.float32]:
        """Return (embedded_length, embedded_length) probabilities of one record.

        Raises SettingsError if the run has no such record or kept no contacts.
        """
        self._refuse_unkept(CONTACTS)
        column = VectorColumn(CONTACTS)
        found = self.row(record, column)[column]
        return found.reshape(math.isqrt(found.size), -1)

    def row(self, record: int, *columns: VectorColumn) -> dict[VectorColumn, Array]:
        """Return the values of columns for one record, flat, in the type that was stored.

        Raises SettingsError if the run has no such record.
        """
        position = int(np.searchsorted(self.records, record))
        if position == len(self) or self.records[position] != record:
            raise SettingsError(f"run {self.facts['id']}: no record {record}")
        file, group, row = (int(one) for one in self._places[position])
        with self.files[file].opened() as checkpoint:
            table = checkpoint.read(group, [*map(str, columns)])
        return {column: values(table.column(str(column)).slice(row, 1)) for column in columns}

    def stored(
        self, *columns: str | VectorColumn
    ) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """Yield every row once, one row group at a time, in the order on disk.

        Yields (rows,) the place of each row in FASTA order, and the requested columns.
        """
        names = [*map(str, columns)]
        for file in self.files:
            with file.opened() as checkpoint:
                for group in checkpoint.row_groups:
                    table = checkpoint.read(group, ["record", *names])
                    here = numbers(table.column("record"))
                    yield np.searchsorted(self.records, here), table.select(names)

    def _refuse_unkept(self, kind: str) -> None:
        if kind not in self.facts["include"]:
            kept = " ".join(self.facts["include"])
            raise SettingsError(f"run {self.facts['id']}: {kind} is not kept, only {kept}")

    def _refuse_incomplete(self) -> None:
        name, total = f"run {self.facts['id']}", self.facts["records_total"]
        twice = np.flatnonzero(self.records[1:] == self.records[:-1])
        if len(twice):
            raise IdentityRefusedError(f"{name}: record {self.records[twice[0]]} stands twice")
        if self.facts["status"] == "finished" and len(self) != total:
            raise IdentityRefusedError(f"{name}: {len(self)} of {total} records in its files")


def values(column: pa.ChunkedArray) -> Array:
    """Return the values of a column of lists, flat."""
    return numbers(pc.list_flatten(column))


def lists(column: pa.ChunkedArray) -> Iterator[Array]:
    """Yield the values of each row of a column of lists, flat."""
    for chunk in column.chunks:
        flat, ends = numbers(chunk.values), numbers(chunk.offsets)
        for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            yield flat[start:stop]


def _pooled(kind: str) -> str:
    if kind not in ("mean", "bos"):
        raise SettingsError(f"kind {kind}: not mean or bos")
    return kind


def _write_at(file: BinaryIO, row: Array, offset: int) -> None:
    """Write a row at an offset; writing through a memory map would raise SIGBUS on a full disk."""
    left = memoryview(row.tobytes())
    while left:
        written = os.pwrite(file.fileno(), left, offset)
        left, offset = left[written:], offset + written


def _find_records(
    files: list[VerifiedFile],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return (N,) record numbers in the order on disk, and (N, 3) file, row group and row."""
    records, places = [np.empty(0, np.int64)], [np.empty((0, 3), np.int32)]
    for i, file in enumerate(files):
        with file.opened() as checkpoint:
            for group in checkpoint.row_groups:
                found = numbers(checkpoint.read(group, ["record"]).column(0))
                place = np.empty((len(found), 3), np.int32)
                place[:, 0], place[:, 1], place[:, 2] = i, group, np.arange(len(found))
                records.append(found)
                places.append(place)
    return np.concatenate(records), np.concatenate(places)
