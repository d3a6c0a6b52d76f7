"""docs/history.md: if this fails, what it prints is not what the commands print.

The page shows a made-up history; it is written here, and every command is run as printed.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from lib.catalog import RELEASED
from lib.ledger.comments import view_comments
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from lib.ledger.questions import questions
from schema.tables import Attempt, Checkpoint, Model, Run
from tests.conftest import ROOT, users_environment
from tests.interpreter import clone

PAGE = (ROOT / "docs" / "history.md").read_text()
QUESTIONS = re.findall(r"^([A-Z][^\n]*\?)\n\n```sql\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
BLOCKS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model(name: str, layers: int, width: int, parameters: int) -> Model:
    return Model(
        name=name, num_layers=layers, hidden_dim=width, attention_heads=20, token_dropout=True,
        parameters=parameters, weights_format="fair-esm", dtype="float32", sha256=digest(name),
        untrained=False, released=name in RELEASED,
    )  # fmt: skip


def run(number: int, made_by: Model, name: str, records: int, residues: int, **facts: str) -> Run:
    """A run of a model on /data/NAME."""
    config = {"name": made_by.name, "sha256": made_by.sha256}
    return Run(
        id=number, uuid=digest(str(number))[:32], model=made_by, esm2_config=config,
        repr_layers=[made_by.num_layers], include=["mean"], precision="float32",
        per_tok_dtype="float32", max_residues=1022, long_sequences="truncate",
        unknown_residues="error", duplicate_ids="error", plan="", input_path=f"/data/{name}",
        input_bytes=2 * residues, input_sha256=digest(name), records_total=records,
        sequences_total=records, residues_total=residues, records_truncated=records // 60,
        residues_mapped=0, output_folder=f"/data/embeddings/run-{number:06d}",
        records_nucleotide_like=0, records_with_gaps=0, settings={}, **facts,
    )  # fmt: skip


def attempt(of: Run, start: str, end: str | None, outcome: str | None, error: str = "") -> Attempt:
    """An attempt on a day in March."""
    day = of.started_at[:10]
    return Attempt(
        run=of, host="atlas", pid=4100 + of.id, weights_path="/data/weights.pt", device="cpu",
        device_name="AMD EPYC", threads=16, tokens_per_pack=4096,
        versions={"torch": "2.13.0", "python": "3.13.1"}, started_at=f"{day}T{start}.000Z",
        heartbeat_at=f"{day}T{end or '15:31:07'}.000Z",
        ended_at=None if end is None else f"{day}T{end}.000Z", outcome=outcome, error=error or None,
    )  # fmt: skip


def checkpoint(by: Attempt, part: int, records: int, residues: int, seconds: float) -> Checkpoint:
    of = by.run
    first = sum(one.records for one in of.checkpoints)
    return Checkpoint(
        run=of, attempt=by, path=f"checkpoint-{part:06d}.parquet", first_position=first,
        stop_position=first + records, records=records, residues=residues, seconds=seconds,
        bytes=records * 5_300, sha256=digest(f"{of.id} {part}"), esm2_config=of.esm2_config,
        committed_at=by.heartbeat_at,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick_python: Path) -> Path:
    """A copy of the project with the history that the page shows."""
    path = tmp_path_factory.mktemp("asking")
    clone(path, quick_python)
    large = model("esm2_t33_650M_UR50D", 33, 1280, 651_043_254)
    tuned = model("phage_tuned", 33, 1280, 651_043_254)
    one = run(
        1, large, "proteins.fasta", 117, 41_462, status="finished",
        started_at="2026-03-02T09:14:05.120Z", finished_at="2026-03-02T09:18:50.320Z",
    )  # fmt: skip
    two = run(
        2, large, "phages.fasta", 5_210, 1_402_300, status="finished",
        started_at="2026-03-02T10:02:11.004Z", finished_at="2026-03-02T12:51:40.871Z",
    )  # fmt: skip
    three = run(
        3, tuned, "phages.fasta", 5_210, 1_402_300, status="finished", label="after tuning",
        started_at="2026-03-09T08:30:00.500Z", finished_at="2026-03-09T13:10:22.750Z",
    )  # fmt: skip
    four = run(
        4, tuned, "gut.fasta", 88_004, 24_110_560, status="running",
        started_at="2026-03-10T14:40:19.060Z",
    )  # fmt: skip
    stopped = "SIGTERM: run 3 interrupted, finished work committed"
    work = [
        (attempt(one, "09:14:05", "09:18:50", "finished"), [(1, 117, 41_462, 281.4)]),
        (attempt(two, "10:02:11", "12:51:40", "finished"), [(1, 5_210, 1_402_300, 10_150.0)]),
        (
            attempt(three, "08:30:00", "10:12:44", "interrupted", stopped),
            [(1, 1_560, 430_100, 3_070.2), (2, 1_560, 410_770, 3_061.9)],
        ),
        (attempt(three, "12:00:03", "13:10:22", "finished"), [(3, 2_090, 561_430, 4_190.0)]),
        (attempt(four, "14:40:19", None, None), [(1, 1_480, 421_960, 3_020.8)]),
    ]
    with open_for_writing(str(path / "runs.sqlite")) as engine, transaction(engine) as session:
        for by, parts in work:
            session.add(by)
            for part in parts:
                session.add(checkpoint(by, *part))
    return path


def test_there_are_commands() -> None:
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize(("command", "printed"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_a_command_prints_what_the_page_shows(folder: Path, command: str, printed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**users_environment(), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.stdout == printed
    assert done.returncode == 0


def test_the_questions_are_those_of_the_schema() -> None:
    assert len(QUESTIONS) >= 8
    assert [(one.text, f"{one.sql}\n") for one in questions()] == QUESTIONS


@pytest.mark.parametrize(("question", "statement"), QUESTIONS, ids=[q for q, _ in QUESTIONS])
def test_a_question_can_be_asked_as_printed(folder: Path, question: str, statement: str) -> None:
    # tests/test_readme.py asks it of real runs, and finds an answer.
    assert query(str(folder / "runs.sqlite"), statement).columns, question


def test_the_columns_of_the_views_are_explained_in_the_schemas_words() -> None:
    for name, comment in view_comments().items():
        section = PAGE.split(f"`{name}`: ")[1].split("\n\n")[1]
        rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
        assert dict(rows) == comment.columns
        assert PAGE.split(f"`{name}`: ")[1].split("\n\n")[0].replace("\n", " ") == comment.rows
