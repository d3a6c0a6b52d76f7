"""A path that may lead to weights, opened once for all formats that look at it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lib.models.held_file import HeldFile
from lib.models.torch_archive import load_archive

__all__ = ["Candidate"]


class Candidate:
    """What lies at `path`; it is opened, and loaded, when a format asks for it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def file(self) -> HeldFile:
        """The file, held open; raises WeightsError if there is none that can be read."""
        return HeldFile(self.path)

    @cached_property
    def archive(self) -> dict[str, Any]:
        """The dictionary that torch.save wrote; raises WeightsError for anything else."""
        return load_archive(self.file)
