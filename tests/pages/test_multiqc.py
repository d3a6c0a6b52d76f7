"""MultiQC: if this fails, a run is missing in the page that a core facility looks at.

What MultiQC asks of a file of custom content; docs/sharing.md says that it was tried with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.ledger.database import open_for_writing, transaction
from tests.conftest import SOME_PROTEINS, Place, Script


@pytest.fixture
def reported(script: Script, place: Place, small_model: Path) -> dict[str, Path]:
    """Two runs with their reports; gives what lies in reports/, by name."""
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    assert script("embed", *flags, "--set", "input.max_residues=200").status == 0
    assert script("embed", *flags).status == 0
    for run in ("1", "2"):
        assert script("report", "--run", run).status == 0
    return {path.name: path for path in (place.folder / "reports").iterdir()}


def content(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text())


def test_each_run_is_a_row_of_one_table(reported: dict[str, Path]) -> None:
    names = [f"run-00000{run}{end}" for run in (1, 2) for end in (".html", "_mqc.json")]
    assert sorted(reported) == sorted(names)
    first, second = (content(reported[f"run-00000{run}_mqc.json"]) for run in (1, 2))
    assert first["plot_type"] == "table"
    for key in ("id", "section_name", "pconfig", "headers"):
        assert first[key] == second[key]
    samples = [*first["data"], *second["data"]]
    assert samples == [f"run {run}: {SOME_PROTEINS.name}" for run in (1, 2)]
    (row,), (other,) = first["data"].values(), second["data"].values()
    assert {*row} == {*first["headers"]}
    assert (row["model"], row["status"]) == ("esm2_small (untrained)", "finished")
    assert (row["records"], row["percent"], row["precision"]) == (15, 100, "float32")
    assert row["truncated"] > other["truncated"] == 0
    assert (row["warnings"], other["warnings"]) == (2, 1)


def test_an_altered_file_is_not_replaced(
    script: Script, place: Place, reported: dict[str, Path]
) -> None:
    own = reported["run-000001_mqc.json"]
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        session.connection().exec_driver_sql("UPDATE runs SET status = 'failed'")
    assert script("report", "--run", "1").status == 0
    (row,) = content(own)["data"].values()
    assert row["status"] == "failed"
    text, page = own.read_text(), reported["run-000001.html"].read_bytes()
    others = [text.replace("failed", "finished"), reported["run-000002_mqc.json"].read_text()]
    for other in [*others, "{}", "[]", "mine", "[" * 100_000]:
        own.write_text(other)
        answer = script("report", "--run", "1")
        assert (answer.status, answer.error) == (2, f"{own}: exists already")
        assert own.read_text() == other
        assert reported["run-000001.html"].read_bytes() == page
