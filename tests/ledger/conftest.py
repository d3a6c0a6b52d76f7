"""A project with runs, embedded once and copied for every test, and its scripts called."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest

from lib.console.program import guarded
from scripts.embed import main as embed
from tests.conftest import DATA, UNIPROT_PART, Place
from tests.processes import Answer
from tests.reference import fasta, write_fasta

QUICK = ["--set", "output.checkpoint_records=4", "--set", "compute.tokens_per_pack=250"]
Call = Callable[..., Answer]


def ask(project: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(project / "runs.sqlite")) as connection, connection:
        return connection.execute(statement, values).fetchall()


def contents(at: Path) -> dict[Path, bytes]:
    """Return the bytes of every file, but for what SQLite keeps beside a database."""
    files = (path for path in at.rglob("*") if path.is_file() and ".sqlite-" not in path.name)
    return {path.relative_to(at): path.read_bytes() for path in files}


def folder(project: Path, run: int = 1) -> Path:
    return project / "embeddings" / f"run-{run:06d}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A project with weights, input, a finished run and one of which half is missing."""
    project = tmp_path_factory.mktemp("made") / "project"
    (project / "models").mkdir(parents=True)
    shutil.copy(small_model, project / "models" / "small.pt")
    place = Place(project)
    place.config.write_text((DATA.parent.parent / "config.ini").read_text())
    source = write_fasta(project / "proteins.fasta", fasta(UNIPROT_PART)[:12])
    flags = ["--esm-model", project / "models" / "small.pt", "--input", source, *QUICK]
    for _ in range(2):
        argv = [*flags, "--no-reuse", "--config", place.config]
        assert embed([*map(str, argv)]) == 0
    (name,) = ask(project, "SELECT max(path) FROM checkpoints WHERE run_id = 2")[0]
    ask(project, "DELETE FROM checkpoints WHERE run_id = 2 AND path = ?", name)
    (folder(project, 2) / str(name)).unlink()
    ask(project, "UPDATE runs SET status = 'interrupted', finished_at = NULL WHERE id = 2")
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy of it at another place, while the first is still there."""
    return shutil.copytree(made, tmp_path / "copied")


@pytest.fixture
def call(project: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call a script with the config.ini of a project, which is the copy unless it is said."""

    def calling(name: str, *argv: str | Path, at: Path = project) -> Answer:
        main = import_module(f"scripts.{name}").main
        capsys.readouterr()
        status = guarded(main, [*map(str, argv), "--config", str(at / "config.ini")])
        return Answer(status, *capsys.readouterr())

    return calling
