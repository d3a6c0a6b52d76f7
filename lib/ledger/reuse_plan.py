"""The reuse plan of a run: what is copied from where, decided once and kept in the run's folder.

The positions of a run's checkpoints mean something only beside its plan: the row of the run has its
SHA-256. The file's name is hidden and has no suffix, so that who reads the folder as one table does
not read it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.arrow import arrow_array, numbers
from lib.errors import IdentityRefusedError
from lib.files import disk_errors, sync_folder
from lib.ledger.footer import footer_of
from lib.sequences.inventory import Inventory
from lib.sequences.reused import Reused
from schema.parquet import FOOTER_KEY, REUSE_PLAN
from schema.tables import Run
from schema.version import WRITER

__all__ = [
    "ReusePlan",
    "Source",
    "check_plan",
    "plan_name",
    "plan_path",
    "read_plan",
    "write_plan",
]

_ROWS_PER_GROUP = 1 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint file that rows are copied from, as it was when the plan was made.

    positions: of the new run's plan, that are copied from it.
    """

    run_id: int
    run_uuid: str
    file: str
    sha256: str
    positions: range


@dataclass(frozen=True)
class ReusePlan:
    """What a run copies: its first positions, source after source, by their rows.

    rows: (R,) the row in its source of each position.
    """

    sources: Sequence[Source]
    reused: Reused
    rows: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.reused)

    @property
    def run_ids(self) -> list[int]:
        """The runs that are copied from, ascending."""
        return sorted({source.run_id for source in self.sources})


def plan_path(run: Run) -> Path:
    """Return where the plan of a run lies."""
    return Path(run.output_folder) / plan_name(run.uuid)


def plan_name(uuid: str) -> str:
    """Return the name of a run's plan in its folder."""
    return f".reuse-{uuid}"


def write_plan(plan: ReusePlan, path: Path) -> str:
    """Write a plan to a new file, on disk as well as in memory; return its SHA-256.

    Raises MachineError if the disk fails; then there is no file.
    """
    columns = [
        arrow_array(plan.reused.records, pa.int64()),
        arrow_array(plan.rows, pa.int32()),
    ]
    sources = [
        {
            "run": source.run_id,
            "uuid": source.run_uuid,
            "file": source.file,
            "sha256": source.sha256,
            "stop_position": source.positions.stop,
        }
        for source in plan.sources
    ]
    footer = {FOOTER_KEY: json.dumps({"writer": WRITER, "sources": sources}).encode()}
    with disk_errors(path):
        try:
            with path.open("x+b") as file:
                pq.write_table(
                    pa.Table.from_arrays(columns, schema=REUSE_PLAN.with_metadata(footer)),
                    file,
                    row_group_size=_ROWS_PER_GROUP,
                    use_dictionary=False,
                    compression="zstd",
                    write_page_checksum=True,
                )
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sync_folder(path.parent)
            return digest
        except (OSError, pa.ArrowException):
            path.unlink(missing_ok=True)
            raise


def check_plan(run: Run) -> None:
    """Raise IdentityRefusedError if the plan of a run, if it has one, is lost or altered."""
    if run.reuse_sha256 is not None:
        with _opened(run):
            pass


def read_plan(run: Run, inventory: Inventory) -> ReusePlan | None:
    """Return the plan of a run; None if it has none.

    inventory: of its input. Raises IdentityRefusedError if the file is lost, altered, or not of
    this input.
    """
    if run.reuse_sha256 is None:
        return None
    with _opened(run) as file:
        # Without threads of Arrow: one that still calls a Python file when the process ends aborts
        # it (https://github.com/apache/arrow/issues/34314).
        parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
        table = parquet.read(use_threads=False)
        sources = _sources(footer_of(table.schema.metadata)["sources"])
        reused = Reused(numbers(table.column("record")), inventory.records)
        rows = numbers(table.column("row"))
        if not _belongs(reused, sources, inventory):
            raise ValueError("not of this input")
    return ReusePlan(sources, reused, rows)


@contextmanager
def _opened(run: Run) -> Iterator[IO[bytes]]:
    """Open the file of a run's plan, whose bytes have the digest on record.

    Raises IdentityRefusedError if they have not, and for what the block finds wrong with them.
    """
    path = plan_path(run)
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("no such regular file")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != run.reuse_sha256:
                raise ValueError("its bytes do not match their digest")
            file.seek(0)
            yield file
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        fact = " ".join(str(error).split())[:200]
        raise IdentityRefusedError(f"run {run.id}: reuse plan {path.name}: {fact}") from None


def _sources(listed: Sequence[dict[str, Any]]) -> list[Source]:
    sources = []
    start = 0
    for one in listed:
        stop = int(one["stop_position"])
        positions = range(start, stop)
        sources.append(Source(int(one["run"]), one["uuid"], one["file"], one["sha256"], positions))
        start = stop
    return sources


def _belongs(reused: Reused, sources: Sequence[Source], inventory: Inventory) -> bool:
    """Return whether each reused sequence is one of an input, is there once, and has a source."""
    records = reused.records
    if not len(records) or sources[-1].positions.stop != len(records):
        return False
    if records.min() < 0 or records.max() >= inventory.records:
        return False
    if not (inventory.same_as[records] == records).all():
        return False
    return int(np.count_nonzero(reused.places >= 0)) == len(records)
