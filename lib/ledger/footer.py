"""The footer of a checkpoint file: what the ledger wrote into it, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from schema.parquet import FOOTER_KEY

__all__ = ["TOTALS", "columns_of", "footer_of", "is_compiled", "read_footer", "read_metadata"]

# Columns of `runs` that footers repeat, beside the identity, so that a lost row can be made anew.
TOTALS = (
    "input_bytes",
    "records_total",
    "sequences_total",
    "residues_total",
    "records_truncated",
    "residues_mapped",
    "records_nucleotide_like",
    "records_with_gaps",
    "sequences_reused",
    "label",
    "started_at",
)


def read_footer(path: Path, file: BinaryIO | None = None) -> dict[str, Any]:
    """Return what the ledger wrote into a checkpoint's footer.

    Takes and raises what `read_metadata` does, and raises what `footer_of` does.
    """
    return footer_of(read_metadata(path, file).metadata)


def read_metadata(path: Path, file: BinaryIO | None = None) -> pq.FileMetaData:
    """Return the footer of a Parquet file; no column is read.

    file: the regular file at `path`, if it is open already; it stays open. Raises ValueError, in
    one line, for a file that is not Parquet, or not readable.
    """
    try:
        if file is None and (path.is_symlink() or not path.is_file()):
            raise ValueError("not a regular file" if path.exists() else "no such file")
        return pq.read_metadata(path if file is None else file)
    except UnicodeDecodeError:  # a column's name, or what Arrow says of it
        raise ValueError("footer not readable: its text is not UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise _not_readable(error) from None


def columns_of(metadata: pq.FileMetaData) -> pa.Schema:
    """Return the columns of a Parquet file; raises ValueError, in one line, for none of Arrow's."""
    try:
        return metadata.schema.to_arrow_schema()
    except pa.ArrowException as error:
        raise _not_readable(error) from None


def _not_readable(error: Exception) -> ValueError:
    return ValueError(f"footer not readable: {' '.join(str(error).split())[:200]}")


def footer_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return what the ledger wrote, out of a Parquet file's key-value metadata.

    Raises ValueError, in one line, if it wrote nothing or it is not readable.
    """
    written = (metadata or {}).get(FOOTER_KEY)
    if written is None:
        raise ValueError("footer has no esm_ledger metadata")
    try:
        content = json.loads(written)
    except (ValueError, RecursionError):  # brackets in brackets, a thousand deep
        raise ValueError("footer metadata is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("footer metadata is not an object")
    return content


def is_compiled(settings: object) -> bool:
    """Return whether a run with these settings compiles its network; older than the option: no.

    settings: on record, in a footer or in the row of a run.
    """
    compute = settings.get("compute") if isinstance(settings, dict) else None
    return isinstance(compute, dict) and compute.get("compile") is True
