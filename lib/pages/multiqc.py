"""MultiQC: a run as a row of a table in MultiQC's page, by its custom content.

https://docs.seqera.io/multiqc/custom_content: files whose names end in _mqc.json. MultiQC joins
those of several runs, which have the same id, to one table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.files import disk_errors

__all__ = ["PRUNED", "is_own", "multiqc_path", "multiqc_text", "summary"]

PRUNED = "-pruned"  # ends the name of a report of a run whose files were pruned
_SEAL = "esm_ledger_seal"
_HEADERS = {
    "model": {"title": "Model", "description": "with (untrained) if its vectors mean nothing"},
    "status": {"title": "Status", "description": "of the run"},
    "layers": {"title": "Layers", "description": "layers kept"},
    "precision": {"title": "Precision", "description": "type of the matrix products"},
    "records": {"title": "Records", "description": "records embedded", "format": "{:,.0f}"},
    "percent": {"title": "Done", "description": "residues embedded", "suffix": "%", "max": 100},
    "truncated": {"title": "Truncated", "description": "records cut", "format": "{:,.0f}"},
    "mapped": {"title": "As X", "description": "letters read as X", "format": "{:,.0f}"},
    "speed": {"title": "Residues/s", "description": "residues per second", "format": "{:,.0f}"},
    "warnings": {"title": "Warnings", "description": "in the run's report", "format": "{:,.0f}"},
}


def summary(line: Mapping[str, Any], precision: str, warnings: int) -> dict[str, Any]:
    """Return the row of a run; line: its row as `run_detail` gives it."""
    row = {
        "model": line["model"],
        "status": line["status"],
        "layers": line["layers"],
        "precision": precision,
        "records": line["records_done"],
        "percent": line["percent"],
        "truncated": line["records_truncated"],
        "mapped": line["residues_mapped"],
        "speed": line["residues_per_second"],
        "warnings": warnings,
    }
    return {name: value for name, value in row.items() if value is not None}


def multiqc_path(report: Path) -> Path:
    """Return where the file for MultiQC lies: beside a report, as `run-000001_mqc.json`.

    A run has one row, also when it is pruned.
    """
    return report.parent / f"{report.stem.removesuffix(PRUNED)}_mqc.json"


def multiqc_text(sample: str, uuid: str, row: Mapping[str, Any]) -> str:
    """Return the file for MultiQC of a run; its last entry tells whether it was altered.

    sample: what the row is called; row: as `summary` gives it.
    """
    content = {
        "id": "esm_ledger",
        "section_name": "ESM-2 embeddings",
        "description": "Runs of esm-ledger.",
        "plot_type": "table",
        "pconfig": {"id": "esm_ledger_runs", "title": "ESM-2 embeddings: runs"},
        "headers": _HEADERS,
        "data": {sample: row},
    }
    return json.dumps(content | {_SEAL: _digest(content, uuid)}, indent=2) + "\n"


def is_own(path: Path, uuid: str) -> bool:
    """Tell whether a file is an unaltered one of the same run."""
    if path.is_symlink() or not path.is_file():
        return False
    with disk_errors(path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        return bool(content.pop(_SEAL) == _digest(content, uuid))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def _digest(content: Mapping[str, Any], uuid: str) -> str:
    return hashlib.sha256(f"{uuid}\n{json.dumps(content)}".encode()).hexdigest()
