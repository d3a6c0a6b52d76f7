"""Unlisted files: checkpoint files that the database does not list, opened once to be looked at."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.ledger.footer import footer_of

__all__ = ["UnlistedFile", "opened_unlisted"]


@dataclass(frozen=True)
class UnlistedFile:
    """An open file: its columns, what the ledger wrote into its footer, and what it was.

    To be read with use_threads=False: a thread of Arrow that still calls a Python file when the
    process ends aborts it (https://github.com/apache/arrow/issues/34314).
    """

    parquet: pq.ParquetFile
    footer: dict[str, Any]
    state: os.stat_result
    opened: io.BufferedReader

    def sha256(self) -> str:
        """Return the digest of the file."""
        self.opened.seek(0)
        return hashlib.file_digest(self.opened, "sha256").hexdigest()


@contextmanager
def opened_unlisted(path: Path) -> Iterator[UnlistedFile]:
    """Open a file for the block; pages are compared with their checksums as they are read.

    Raises ValueError, in one line, for what is wrong with it, now or when it is read.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError("not a regular file")
    try:
        with (
            path.open("rb") as opened,
            pq.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False) as parquet,
        ):
            state = os.fstat(opened.fileno())
            yield UnlistedFile(parquet, footer_of(parquet.metadata.metadata), state, opened)
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
