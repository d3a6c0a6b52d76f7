"""Provenance: what an export says of the run and the model that its vectors come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from lib.embeddings.reading import RunEmbeddings
from lib.files import new_path
from schema.parquet import VectorColumn
from schema.version import WRITER

__all__ = [
    "FACTS_FILE",
    "computed_with",
    "described_path",
    "facts_of",
    "facts_path",
    "facts_text",
    "facts_to_publish",
]

# The name of the facts in a folder; beside a file they have its name and `.json`.
FACTS_FILE = "run.json"
_OF_RUN = (
    "precision",
    "compile",
    "max_residues",
    "long_sequences",
    "records_truncated",
    "unknown_residues",
    "residues_mapped",
    "duplicate_ids",
    "records_total",
    "input_sha256",
    "status",
    "started_at",
    "finished_at",
)


def facts_of(run: RunEmbeddings, columns: Sequence[VectorColumn]) -> dict[str, Any]:
    """Return what identifies a run, its model and the exported columns, without None.

    With one column its layer and its pooling are said too (`none`: all residues). `model_config`
    is the whole ESM2Config snapshot, `computed_with` the versions of the libraries. `input` is the
    first of several files, `inputs` then has a list for each of their properties.
    """
    facts = {
        "model": run.model["name"],
        "model_sha256": run.model["sha256"],
        "untrained": bool(run.model["untrained"]),
        "model_config": run.model,
        "run": run.facts["id"],
        "run_uuid": run.facts["uuid"],
        "input": run.facts["input_path"],
        "records": len(run),
        "records_copied": int(run.copied.sum()),
        "columns": [*map(str, columns)],
        "computed_with": computed_with(run),
        "written_by": WRITER,
    }
    facts |= {name: run.facts[name] for name in _OF_RUN}
    if len(run.inputs) > 1:
        keys = ("path", "sha256", "first_record", "records")
        facts["inputs"] = {key: [one[key] for one in run.inputs] for key in keys}
    if len(columns) == 1:
        (column,) = columns
        facts["pooling"] = column.kind if column.is_pooled else "none"
        facts["layer"] = column.layer
    return {name: value for name, value in facts.items() if value is not None}


def facts_to_publish(run: RunEmbeddings, columns: Sequence[VectorColumn]) -> dict[str, Any]:
    """Return what `facts_of` returns, with the names of input files instead of their paths."""
    facts = facts_of(run, columns)
    facts["input"] = PurePath(facts["input"]).name
    if "inputs" in facts:
        facts["inputs"]["path"] = [PurePath(path).name for path in facts["inputs"]["path"]]
    return facts


def computed_with(run: RunEmbeddings) -> dict[str, str]:
    """Return the versions of Python and the libraries by name, several if attempts differ.

    With them is how attention was computed, where that is known.
    """
    found: dict[str, list[str]] = {}
    for attempt in run.attempts:
        for name, number in attempt["versions"].items():
            if number not in found.setdefault(name, []):
                found[name].append(number)
    return {name: ", ".join(numbers) for name, numbers in found.items()}


def facts_text(facts: Mapping[str, Any]) -> str:
    """Return facts as the text of a JSON file."""
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def facts_path(to: Path) -> Path:
    """Return where the facts of a file stand whose format has no place for them."""
    return to.with_name(to.name + ".json")


@contextmanager
def described_path(to: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary path for `to`, as `new_path` does, and write the facts as `to`.json.

    For formats that have no place of their own for them. The same facts may be there: a process
    that is killed between the two names leaves them.
    """
    text = facts_text(facts)

    def is_same(path: Path) -> bool:
        return path.is_file() and path.read_bytes() == text.encode()

    with (
        new_path(to, folder=False) as temporary,  # refuses `/`, which has no name for the other
        new_path(facts_path(to), folder=False, replaceable=is_same) as temporary_facts,
    ):
        temporary_facts.write_text(text, encoding="utf-8")
        yield temporary
