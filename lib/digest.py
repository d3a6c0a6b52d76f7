"""Digests of files: what identifies weights, inputs and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["file_sha256", "files_stamp", "listing_sha256"]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing_sha256(entries: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 of what `sha256sum` prints for (digest, name) entries."""
    listing = hashlib.sha256()
    for digest, name in entries:
        listing.update(f"{digest}  {name}\n".encode())
    return listing.hexdigest()


def files_stamp(files: Iterable[Path]) -> tuple[object, ...]:
    """Return what changes when one of `files` is written or replaced; raises OSError."""
    found = [(file.name, file.stat()) for file in files]
    return tuple((name, is_.st_ino, is_.st_size, is_.st_mtime_ns) for name, is_ in found)
