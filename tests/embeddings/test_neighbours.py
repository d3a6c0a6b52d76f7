"""Neighbours: if this fails, somebody takes proteins for alike whose vectors are not, or compares
vectors of two models.

Compared with the plainest code there is, in float64.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow.parquet as pq
import pytest

from lib.embeddings import RunEmbeddings, open_run
from lib.embeddings.neighbours import _Best
from lib.jobs import loading
from lib.ledger.history import query
from tests import processes
from tests.conftest import SOME_PROTEINS, UNIPROT_PART, Once, Place, Script
from tests.reference import fasta, write_fasta
from tests.test_make import make

# To the six decimals that are written.
BOUND = 1.5e-6


def cosines_of(queries: RunEmbeddings, targets: RunEmbeddings) -> Any:  # noqa: ANN401
    parts = []
    for run in (queries, targets):
        unit = run.matrix().astype(np.float64)
        parts.append(unit / np.linalg.norm(unit, axis=1, keepdims=True))
    return parts[0] @ parts[1].T


def check(frame: Any, queries: RunEmbeddings, targets: RunEmbeddings, count: int) -> None:  # noqa: ANN401
    """Compare neighbours as they were written with cosines in float64."""
    cosines = cosines_of(queries, targets)
    if queries.facts["id"] == targets.facts["id"]:
        np.fill_diagonal(cosines, -2)
    assert frame["query_record"].tolist() == np.repeat(queries.records, count).tolist()
    assert frame["query"].tolist() == np.repeat(queries.ids, count).tolist()
    assert frame["rank"].tolist() == [*range(1, count + 1)] * len(queries)
    places = np.searchsorted(targets.records, frame["target_record"])
    assert frame["target"].tolist() == [targets.ids[place] for place in places]
    places = places.reshape(-1, count)
    assert all(len(set(row)) == count for row in places.tolist())
    written = frame["cosine"].to_numpy().reshape(-1, count)
    np.testing.assert_allclose(written, np.take_along_axis(cosines, places, 1), atol=BOUND)
    np.testing.assert_allclose(written, -np.sort(-cosines, axis=1)[:, :count], atol=BOUND)


@pytest.fixture
def runs(script: Script, place: Place, small_model: Path, once: Once) -> None:
    """Run 1: a part of UniProt; run 2: other proteins; both by the same model."""

    def embed_both() -> None:
        place.set("output", "checkpoint_records", 7)
        for source in (UNIPROT_PART, SOME_PROTEINS):
            answer = script("embed", "--esm-model", small_model, "--input", source)
            assert answer.status == 0, answer.err

    once(embed_both)


# As one block, and in blocks of a few queries and targets.
@pytest.mark.parametrize(("query_bytes", "cosines"), [(1 << 20, 1 << 20), (4 * 64 * 4, 12)])
def test_the_nearest_of_another_run(
    script: Script,
    place: Place,
    runs: None,
    monkeypatch: pytest.MonkeyPatch,
    query_bytes: int,
    cosines: int,
) -> None:
    monkeypatch.setattr("lib.embeddings.neighbours._QUERY_BYTES", query_bytes)
    monkeypatch.setattr("lib.embeddings.neighbours._COSINES", cosines)
    monkeypatch.setattr("lib.embeddings.neighbours._ROWS_AT_ONCE", 5)
    to = place.folder / "nearest.csv"
    answer = script("neighbours", "--run", "1", "--query", "2", "--neighbours", "3", "--to", to)
    assert answer.status == 0, answer.err
    targets, queries = open_run(place.database, 1), open_run(place.database, 2)
    assert answer.out == (
        f"run 1: nearest of {len(targets)} records by mean_2, for 15 records of run 2, in {to} "
        "(untrained weights)\n"
    )
    check(pandas.read_csv(to), queries, targets, 3)
    facts = json.loads((place.folder / "nearest.csv.json").read_text())
    assert (facts["neighbours"], facts["measure"]) == (3, "cosine")
    for run, name in ((targets, "targets"), (queries, "queries")):
        assert facts[name]["run_uuid"] == run.facts["uuid"]
        assert facts[name]["model_sha256"] == run.model["sha256"]
        assert facts[name]["columns"] == ["mean_2"]


def test_a_record_is_not_its_own_neighbour(script: Script, place: Place, runs: None) -> None:
    to = place.folder / "nearest.parquet"
    answer = script("neighbours", "--run", "2", "--query", "2", "--to", to, "--neighbours", "99")
    assert answer.status == 0, answer.err
    run = open_run(place.database, 2)
    check(pandas.read_parquet(to), run, run, 14)
    facts = json.loads(pq.read_metadata(to).metadata[b"esm_ledger_export"])
    assert facts["targets"] == facts["queries"]


def test_equal_neighbours_are_in_the_order_of_the_fasta(
    script: Script, place: Place, small_model: Path
) -> None:
    (_, one), (_, other) = fasta(SOME_PROTEINS)[:2]
    entries = [(f"p{i}", one if i % 3 else other) for i in range(40)]
    source = write_fasta(place.folder / "same.fasta", entries)
    assert script("embed", "--esm-model", small_model, "--input", source).status == 0
    to = place.folder / "nearest.csv"
    flags = ["--run", "1", "--query", "1", "--neighbours", "5", "--to", to]
    assert script("neighbours", *flags).status == 0
    frame = pandas.read_csv(to)
    for record, found in frame.groupby("query_record")["target_record"]:
        alike = [i for i in range(40) if bool(i % 3) == bool(record % 3) and i != record]
        assert found.tolist() == alike[:5]
    assert (frame["cosine"] == 1).all()


def test_the_best_of_blocks_are_the_best_of_all() -> None:
    rng = np.random.default_rng(7)
    # Few different values, so that many are equal, and differences far below the sixth decimal.
    cosines = rng.integers(-3, 4, (9, 200)) / 4 + rng.normal(0, 1e-9, (9, 200))
    for cuts in ([], [1, 2, 3], [50, 100, 101], [199]):
        best = _Best(9, 6)
        for positions in np.split(rng.permutation(200), cuts):
            best.add(positions, cosines[:, positions].astype(np.float32))
        expected = np.lexsort((np.tile(np.arange(200), (9, 1)), -np.round(cosines, 6)), axis=1)
        assert best.places.tolist() == expected[:, :6].tolist()


def test_vectors_of_other_models_and_rules_are_refused(
    script: Script,
    place: Place,
    small_model: Path,
    other_model: Path,
    tall_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "_compile", lambda _network: None)  # which takes long
    runs = [
        (small_model, [], ""),
        (other_model, [], "sha256 is {sha256}, {own} in run 1"),
        (tall_model, [], "attention_heads is 6, 4 in run 1"),
        (small_model, ["--set", "compute.precision=bfloat16"], "precision is bfloat16, float32 in"),
        (small_model, ["--set", "compute.compile=yes"], "compile is True, False in run 1"),
        (small_model, ["--set", "input.max_residues=99"], "max_residues is 99, 1022 in run 1"),
        (
            small_model,
            ["--set", "input.long_sequences=whole"],
            "long_sequences is whole, truncate in run 1",
        ),
        (small_model, ["--repr-layers", "1"], "mean_2 is not kept"),
        (small_model, ["--include", "bos"], "mean_2 is not kept"),
    ]
    for model, flags, _ in runs:
        answer = script("embed", "--esm-model", model, "--input", SOME_PROTEINS, *flags)
        assert answer.status == 0, answer.err
    own = open_run(place.database, 1).model["sha256"]
    before = place.files()
    for number, (_, _, fact) in enumerate(runs[1:], start=2):
        sha256 = open_run(place.database, number).model["sha256"]
        to = place.folder / "nearest.csv"
        answer = script("neighbours", "--run", "1", "--query", str(number), "--to", to)
        assert answer.status == 3, answer.out
        assert answer.error.startswith(f"run {number}: {fact.format(sha256=sha256, own=own)}")
    assert place.files() == before


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (["--to", "x.tsv"], "x.tsv: neither .csv nor .parquet"),
        (["--to", "config.ini"], "config.ini: exists already"),
        (["--to", "y.csv"], "y.csv.json: exists already"),
        (["--to", "none/x.csv"], "none: no such folder"),
        (["--to", "x.csv", "--neighbours", "0"], "neighbours 0: not 1 or more"),
        (["--to", "x.csv", "--query", "9"], "run 9: not in database "),
        (["--to", "x.csv", "--layer", "1"], "run 1: layer 1 is not kept, only 2"),
        (["--to", "x.csv", "--query", "none.fasta"], "none.fasta: no such file"),
    ],
)
def test_what_cannot_be_written_or_found_is_refused_before_any_work(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    fact: str,
) -> None:
    assert script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS).status == 0
    monkeypatch.chdir(place.folder)
    (place.folder / "y.csv.json").touch()
    before = place.files()
    answer = script("neighbours", "--run", "1", "--query", SOME_PROTEINS, *flags)
    assert answer.status == 2
    assert fact in answer.error
    assert place.files() == before
    assert query(str(place.database), "SELECT count(*) FROM runs").rows == [(1,)]


def test_a_file_is_embedded_by_the_very_model_of_the_run(
    script: Script, place: Place, small_model: Path, other_model: Path
) -> None:
    embed = ["--input", UNIPROT_PART, "--include", "mean", "bos", "--repr-layers", "0", "1"]
    rules = ["--set", "input.max_residues=30", "--set", "compute.precision=bfloat16"]
    model = Path(shutil.copy(small_model, place.folder / "mine.pt"))
    assert script("embed", "--esm-model", model, *embed, *rules).status == 0
    # What config.ini says today is another model, and other rules.
    place.set("model", "esm_model", other_model)
    place.set("compute", "compile", "yes")
    to = place.folder / "nearest.csv"
    flags = ["--run", "1", "--query", SOME_PROTEINS, "--layer", "0", "--neighbours", "2"]
    answer = script("neighbours", *flags, "--to", to)
    assert answer.status == 0, answer.err
    made = open_run(place.database, 2)
    assert made.model["sha256"] == open_run(place.database, 1).model["sha256"]
    assert (made.facts["precision"], made.facts["max_residues"]) == ("bfloat16", 30)
    assert made.facts["compile"] is False
    assert (made.layers, made.facts["include"], len(made)) == ([0], ["mean"], 15)
    assert list(pandas.read_csv(to)["query"]) == np.repeat(made.ids, 2).tolist()
    # It may have moved, but it must be the same.
    model.rename(place.folder / "moved.pt")
    flags += ["--to", str(place.folder / "again.csv")]
    assert script("neighbours", *flags).status == 2
    assert script("neighbours", *flags, "--esm-model", place.folder / "moved.pt").status == 0
    shutil.copy(other_model, model)
    (place.folder / "again.csv").unlink()
    (place.folder / "again.csv.json").unlink()
    answer = script("neighbours", *flags)
    assert answer.status == 3
    assert answer.error.startswith("run 1: sha256 of the weights is ")
    assert query(str(place.database), "SELECT count(*) FROM runs").rows == [(3,)]


def test_make_hands_the_query_on(place: Place, runs: None) -> None:
    to = place.folder / "it's near.csv"
    variables = {"RUN": "1", "QUERY": "2", "TO": str(to), "CONFIG": str(place.config)}
    done = make("neighbours", "ARGS=--neighbours 1", variables=variables)
    assert done.returncode == 0, done.stderr
    assert len(pandas.read_csv(to)) == 15


# bytes: less than the vectors of the queries, or more than they and less than the CSV.
@pytest.mark.parametrize("limit", [9000, 20_000])
def test_a_full_disk_leaves_nothing(place: Place, runs: None, limit: int) -> None:
    before = place.files()
    to = place.folder / "out.csv"
    flags = ["--run", "1", "--query", "1", "--to", to, "--config", place.config]
    limited = partial(processes.limit_files, limit)
    with place.read_by_another():
        done = processes.run("neighbours", *flags, prepare=limited)
    assert done.status == 4, done.err
    assert done.err.startswith(f"error: {to}")
    assert place.files() == before
