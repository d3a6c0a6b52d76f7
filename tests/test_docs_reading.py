"""docs/reading.md: if this fails, what people copy from it does not read their run.

Every program runs as printed, in a process of its own, in a folder with a run and its database.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lib.catalog import RELEASED
from lib.embeddings import RunEmbeddings, open_run
from lib.models.untrained import make_model
from lib.settings import DEFAULT_CONFIG
from scripts.embed import main as embed
from tests.conftest import ROOT, run_program

# The model that `make demo` is like.
DEMO = "esm2_t6_8M_UR50D"
# All programs read the one run.
pytestmark = pytest.mark.xdist_group("reading")
PAGE = (ROOT / "docs" / "reading.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page assumes: embeddings/run-000001 of the demo's shape, runs.sqlite."""
    path = tmp_path_factory.mktemp("reading")
    shutil.copy(DEFAULT_CONFIG, path / "config.ini")
    shape = RELEASED[DEMO].shape
    make_model(path / "six.pt", shape.num_layers, shape.hidden_dim, shape.attention_heads)
    flags = ["--config", path / "config.ini", "--esm-model", path / "six.pt"]
    source = ROOT / "examples" / "proteins.fasta"
    assert embed([*map(str, flags), "--input", str(source), "--set", "input.max_residues=20"]) == 0
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> RunEmbeddings:
    return open_run(folder / "runs.sqlite", 1)


def output(folder: Path, containing: str) -> str:
    """Run the one program of the page that contains some text; return what it prints."""
    (program,) = [one for one in PROGRAMS if containing in one]
    return run_program(folder, program)


def nearest(run: RunEmbeddings) -> str:
    """Return the id nearest to record 0's by cosine, by the plainest code there is."""
    unit = run.matrix().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return run.ids[int((unit[1:] @ unit[0]).argmax()) + 1]


def test_every_program_is_run() -> None:
    assert len(PROGRAMS) == 8


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames(folder: Path, run: RunEmbeddings, library: str) -> None:
    assert output(folder, f"import {library}\n") == f"(117, 320) {' '.join(run.ids)}\n"


def test_scikit_learn(folder: Path, run: RunEmbeddings) -> None:
    assert output(folder, "sklearn") == f"{run.ids[0]} {nearest(run)}\n"


def test_a_notebook_embeds_on_the_record(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(folder / "six.pt", tmp_path / "models" / "esm2_untrained_t6_8M.pt")
    shutil.copy(folder / "config.ini", tmp_path)
    assert output(tmp_path, "lib.jobs.notebook") == (
        "run 1: 2 records by esm2_untrained_t6_8M (untrained weights)\n1 first second (2, 320)\n"
    )
    assert open_run(tmp_path / "runs.sqlite", 1).facts["status"] == "finished"


def test_hugging_face_datasets(folder: Path) -> None:
    assert output(folder, "load_dataset") == "117 (3, 320)\n"


def test_duckdb_joins_the_run_database_with_the_folder(folder: Path, run: RunEmbeddings) -> None:
    # Without a network, as the page's last program does it.
    output(folder, "INSTALL")
    lines = output(folder, "ATTACH").splitlines()
    model = f"six 1 {run.model['sha256']}"
    rows = zip(run.records, run.ids, strict=True)
    assert lines == [f"1 {record} {name} {model}" for record, name in rows]


def test_duckdb_finds_nearest_neighbours_by_cosine(folder: Path, run: RunEmbeddings) -> None:
    assert output(folder, "array_cosine_similarity") == f"{(run.ids[0], nearest(run))}\n"
