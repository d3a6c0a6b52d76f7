"""README: if this fails, a command or a question that people copy from it does not work.

Commands run as printed, in a fresh copy of the project whose example proteins are cut short.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from lib.ledger.questions import questions
from tests.conftest import ROOT, run_program, users_environment
from tests.interpreter import clone
from tests.reference import fasta, write_fasta

# The commands run once, in their order, in one process of tests.
pytestmark = pytest.mark.xdist_group("readme")
README = (ROOT / "README.md").read_text()
EXAMPLES = ROOT / "examples" / "proteins.fasta"
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
# The README lists the questions, docs/history.md has their queries, both from the schema.
QUESTIONS = [(one.text, one.sql) for one in questions()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick_python: Path) -> Path:
    path = tmp_path_factory.mktemp("readme")
    clone(path, quick_python)
    # The beginnings of the same proteins, and the whole longest, which is cut by the rules: what
    # is computed for them is compared elsewhere.
    proteins = fasta(EXAMPLES)
    longest = max(len(sequence) for _, sequence in proteins)
    brief = [
        (header, sequence if len(sequence) == longest else sequence[:40])
        for header, sequence in proteins
    ]
    write_fasta(path / EXAMPLES.relative_to(ROOT), brief)
    return path


@pytest.fixture(scope="module")
def after_commands(folder: Path) -> Iterator[dict[str, subprocess.CompletedProcess[str]]]:
    """Run the README's commands in their order; `make test` is what runs this."""
    yield {
        command: subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env=users_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        for command in COMMANDS
        if command != "make test"
    }


def test_there_are_commands_and_questions() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert len(COMMANDS) > 10
    assert len(QUESTIONS) >= 8


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "make test"])
def test_a_command_works_as_printed(
    after_commands: dict[str, subprocess.CompletedProcess[str]], command: str
) -> None:
    done = after_commands[command]
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_demo_says_untrained_and_where_its_output_lies(
    after_commands: dict[str, subprocess.CompletedProcess[str]], folder: Path
) -> None:
    out = after_commands["make demo"].stdout
    assert "Untrained weights" in out
    assert f"117 records in 1 checkpoint in {folder}/embeddings/run-000001" in out
    assert "esm2_untrained_t6_8M (untrained)" in out


def test_the_demo_ends_with_three_things_to_do_that_work(
    after_commands: dict[str, subprocess.CompletedProcess[str]], folder: Path
) -> None:
    done = after_commands["make demo"]
    assert (done.stdout + done.stderr).count("attention_heads") == 1  # the table, once
    last = done.stdout.splitlines()[-4:]
    assert last[0] == "What to do next:"
    assert all(line.startswith("  make ") for line in last[1:])
    for line in last[1:3]:
        again = subprocess.run(
            ["sh", "-c", line],
            cwd=folder,
            env=users_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert again.returncode == 0, again.stderr
        assert "run 1" in again.stdout
    assert "MODEL=esm2_t6_8M_UR50D INPUT=examples/proteins.fasta " in last[3]


# What the README's lines found, in the words of whoever checks them.
FOUND = """
import json
print(json.dumps({
    "pandas": [frame["id"].to_list(), frame.columns.to_list()],
    "polars": [table["id"].to_list(), table.columns],
    "datasets": [rows.num_rows, rows.column_names],
    "matrix": matrix.tolist(),
    "nearest": nearest[:, 0].tolist(),
    "which": [row[0] for row in which],
    "similar": [name for (name,) in similar],
}))
"""
# As DuckDB would download it at the first ATTACH: the last program of that page.
SQLITE_READER = (ROOT / "docs" / "reading.md").read_text().split("```python\n")[-1].split("```")[0]


def test_the_python_lines_read_a_run(
    after_commands: dict[str, subprocess.CompletedProcess[str]], folder: Path
) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found = json.loads(run_program(folder, SQLITE_READER + lines + FOUND, afresh=True))
    ids = [header.split()[0] for header, _ in fasta(EXAMPLES)]
    columns = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert columns[0] == "record"
    own = ["record", "id", "description", "length", "embedded_length"]
    own += ["embedded_sha256", "sequence_md5", "mean_6"]
    assert found["pandas"] == [ids, own]
    assert found["polars"] == [ids, own]
    assert found["datasets"] == [117, own]
    unit = np.array(found["matrix"])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert unit.shape == (117, 320)
    cosines = unit @ unit.T - 2 * np.eye(117)
    picked = cosines[np.arange(117), found["nearest"]]
    np.testing.assert_allclose(picked, cosines.max(axis=1), atol=1e-6)
    assert sorted(found["which"]) == [1] * 117 + [2] * 117 + [3] * 117
    assert found["similar"] == [ids[0], *(ids[i] for i in np.argsort(-cosines[0])[:4])]


@pytest.fixture(scope="module")
def eventful_database(
    after_commands: dict[str, subprocess.CompletedProcess[str]], folder: Path
) -> str:
    """The database after the commands, with something to find for every question."""
    url = str(folder / "runs.sqlite")
    with open_for_writing(url) as engine, transaction(engine) as session:
        change = session.connection().exec_driver_sql
        change("UPDATE models SET name = 'esm2_t33_650M_UR50D', untrained = 0, released = 1")
        change("INSERT INTO models (name, sha256) SELECT name, 'f00' FROM models")
        change("UPDATE runs SET model_id = 2, status = 'interrupted' WHERE id = 2")
        change("UPDATE attempts SET outcome = 'interrupted', error = 'SIGINT' WHERE run_id = 2")
        change("UPDATE checkpoints SET esm2_config = NULL WHERE run_id = 2")
        change(
            "INSERT INTO workers"
            " (attempt_id, host, pid, device_name, versions, started_at, seen_at)"
            " SELECT id, host, pid, device_name, versions, started_at, heartbeat_at FROM attempts"
            " WHERE run_id = 1"
        )
        change("UPDATE checkpoints SET worker_id = (SELECT max(id) FROM workers) WHERE run_id = 1")
    return url


def test_the_questions_are_those_of_the_schema() -> None:
    listed = re.findall(r"^- ([A-Z].*\?)$", README, re.MULTILINE)
    assert listed == [one.text for one in questions()]


@pytest.mark.parametrize(("question", "statement"), QUESTIONS, ids=[q for q, _ in QUESTIONS])
def test_a_question_has_an_answer(eventful_database: str, question: str, statement: str) -> None:
    answer = query(eventful_database, statement)
    assert answer.rows, question
    assert all(value is not None for row in answer.rows for value in row[:3])
