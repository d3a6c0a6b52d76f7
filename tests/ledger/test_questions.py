"""Questions: if this fails, an answer that the docs promise leaves runs out or tells of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from lib.ledger.questions import questions
from schema.tables import Input, Worker
from tests.test_docs_history import attempt, checkpoint, digest, model, run


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A finished run of two files that copied one of two checkpoints, and one that was killed."""
    small = model("esm2_t33_650M_UR50D", 33, 1280, 651_043_254)
    started = "2026-03-02T09:14:05.120Z"
    one = run(1, small, "first.fasta", 20, 4_000, status="finished", started_at=started)
    two = run(2, small, "first.fasta", 20, 4_000, status="running", started_at=started)
    one.output_folder = "./embeddings/run-000001"
    one.inputs = [
        Input(
            number=number, path=f"/data/{name}", sha256=digest(name), bytes=9,
            first_record=10 * number, records=10,
        )
        for number, name in enumerate(["first.fasta", "second.fasta"])
    ]  # fmt: skip
    done = attempt(one, "09:14:05", "09:18:50", "finished")
    worker = Worker(
        host="node7", pid=1, device_name="NVIDIA L4", versions={}, started_at=started,
        seen_at=started, outcome="finished",
    )  # fmt: skip
    computed, copied = checkpoint(done, 1, 10, 1_980, 2.0), checkpoint(done, 2, 10, 0, 100.0)
    copied.reused_run_id = 2
    path = tmp_path / "runs.sqlite"
    with open_for_writing(str(path)) as engine, transaction(engine) as session:
        session.add(done)
        session.add(attempt(two, "09:20:00", None, None))
        session.flush()
        worker.attempt_id = done.id
        session.add(worker)
        session.flush()
        computed.worker_id = worker.id
        session.add_all([computed, copied])
    return path


def answer(database: Path, start: str, *said: tuple[str, str]) -> list[dict[str, object]]:
    """Ask the question that begins so, with other words in the place of its examples."""
    (sql,) = [one.sql for one in questions() if one.text.startswith(start)]
    for example, word in said:
        sql = sql.replace(example, word)
    return query(str(database), sql).dictionaries()


@pytest.mark.parametrize("name", ["first.fasta", "second.fasta"])
def test_a_run_is_found_by_each_of_its_inputs(database: Path, name: str) -> None:
    found = answer(database, "Which runs used this model on", ("proteins.fasta", name))
    assert [one["run"] for one in found] == [1]


def test_tokens_per_second_are_those_that_were_computed_and_where(database: Path) -> None:
    assert answer(database, "How many tokens per second") == [
        {
            "model": "esm2_t33_650M_UR50D",
            "machine": "node7",
            "processor": "NVIDIA L4",
            "tokens_per_second": 1000,  # 1,980 residues and 20 ends in 2 s
        }
    ]


@pytest.mark.parametrize("start", ["", "./embeddings/", "{folder}/embeddings/"])
def test_a_file_is_found_by_its_name_and_by_its_whole_path(database: Path, start: str) -> None:
    example = "run-000001/checkpoint-000001.parquet"
    path = start.format(folder=database.parent) + example
    found = answer(database, "Which model made this file", (example, path))
    assert [one["run"] for one in found] == [1]


def test_a_file_of_another_project_is_not_found(database: Path) -> None:
    example = "run-000001/checkpoint-000001.parquet"
    path = f"/other/embeddings/{example}"
    assert answer(database, "Which model made this file", (example, path)) == []


def test_a_killed_run_that_was_not_resumed_was_stopped(database: Path) -> None:
    (found,) = answer(database, "Which runs were stopped")
    assert (found["run_id"], found["outcomes"]) == (2, "running or killed")
