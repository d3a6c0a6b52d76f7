"""What processes of tests/processes.py find imported: scripts, and what those import late."""

from __future__ import annotations

from importlib import import_module

import pyarrow as pa
import torch  # noqa: F401
from sqlalchemy.orm import configure_mappers

from tests.conftest import ROOT

__all__: list[str] = []

pa.array([1.0])
configure_mappers()
for _path in sorted((ROOT / "scripts").glob("[!_]*.py")):
    import_module(f"scripts.{_path.stem}")
