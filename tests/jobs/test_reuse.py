"""Reuse: if this fails, vectors of another model or sequence are copied, or known ones recomputed.

Every run that copies is compared with one that computes everything.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import sqlite3
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lib.embeddings import open_run
from lib.files import file_sha256
from lib.jobs import copying, loading
from lib.jobs.reuse import SEARCH_BYTES, LostSourceError, SourceFiles, _Search
from lib.ledger.footer import read_footer
from lib.models.detection import Detection
from lib.network import esm2
from schema.tables import Checkpoint, Run
from tests import processes
from tests.conftest import DATA, SOME_PROTEINS, UNIPROT_PART, Place, Script, run_program
from tests.jobs.test_adoption import written_again
from tests.processes import Answer
from tests.reference import (
    assert_near,
    assert_same_bits,
    fasta,
    worst_residue_error,
    write_fasta,
)

Entries = list[tuple[str, str]]
KINDS = ["mean", "bos", "per_tok", "contacts"]
# Small files and packs, so that there are several of each.
QUICK = ["--set", "output.checkpoint_records=5", "--set", "compute.tokens_per_pack=400"]
QUICK += ["--set", "input.max_residues=120"]
REAL = fasta(UNIPROT_PART)[:30]


@pytest.fixture
def reusing(place: Place) -> Place:
    """A place where runs reuse what earlier ones embedded, as they do by default."""
    place.set("output", "reuse", "yes")
    return place


@pytest.fixture
def embed(script: Script, reusing: Place, small_model: Path) -> Callable[..., Answer]:
    """Embed entries as a run; returns what was said."""

    def call(entries: Entries, *flags: str, model: Path = small_model) -> Answer:
        write_fasta(reusing.folder / "input.fasta", entries)
        answer = script("embed", *again(reusing, model), *flags)
        assert answer.status == 0, answer.err
        return answer

    return call


def again(place: Place, model: Path) -> list[object]:
    """Return the flags of an `embed` of what lies in the input file."""
    return ["--esm-model", model, "--input", place.folder / "input.fasta", *QUICK]


def said(answer: Answer, word: str = "reused: ") -> list[str]:
    return [line for line in answer.err.splitlines() if word in line]


def folder(place: Place, run: int) -> Path:
    return place.output / f"run-{run:06d}"


def change(place: Place, statement: str) -> None:
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute(statement)


# ---- What is there as a whole


def test_a_finished_run_of_the_same_identity_and_input_is_named(
    embed: Callable[..., Answer], reusing: Place
) -> None:
    half = ["--set", "compute.precision=bfloat16"]
    longer = ["--set", "input.max_residues=121"]
    twin = " has these vectors"
    assert said(embed(REAL[:4], "--include", "mean", "bos"), twin) == []
    assert said(embed(REAL[:4]), twin) == ["run 1 has these vectors"]
    assert said(embed(REAL[:4], "--no-reuse"), twin) == ["run 2 has these vectors"]
    # Run 1 alone kept both; no run has another layer, precision, limit or input.
    assert said(embed(REAL[:4], "--include", "bos"), twin) == ["run 1 has these vectors"]
    for flags in (["--repr-layers", "0"], half, longer):
        assert said(embed(REAL[:4], *flags), twin) == []
    assert said(embed(REAL[:3]), twin) == []
    change(reusing, "UPDATE runs SET status = 'interrupted' WHERE id = 3")
    change(reusing, "UPDATE runs SET esm2_config = NULL, model_id = NULL WHERE id = 2")
    change(reusing, "UPDATE runs SET pruned_at = '2026' WHERE id = 1")
    assert said(embed(REAL[:4]), twin) == []
    path = folder(reusing, 9) / "checkpoint-000001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert said(embed(REAL[:4]), twin) == []
    shutil.rmtree(folder(reusing, 10))
    assert said(embed(REAL[:4]), twin) == []


def test_a_model_of_the_same_name_has_other_vectors(
    embed: Callable[..., Answer], other_model: Path
) -> None:
    embed(REAL[:4])
    assert said(embed(REAL[:4], model=other_model), " has these vectors") == []


# ---- What is not copied


def test_other_heads_and_token_dropout_are_another_model(
    embed: Callable[..., Answer], small_model: Path, tmp_path: Path
) -> None:
    """Tensors alone do not say them."""
    content = torch.load(small_model, weights_only=False)["model"]
    bare = tmp_path / "bare.pt"
    torch.save({key: one for key, one in content.items() if "inv_freq" not in key}, bare)

    def properties(heads: int, dropout: str) -> list[str]:
        known = ["num_layers=2", "hidden_dim=64", f"attention_heads={heads}"]
        known.append(f"token_dropout={dropout}")
        return [part for one in known for part in ("--set", f"model.{one}")]

    embed(REAL[:5], *properties(4, "yes"), model=bare)
    for flags in (properties(2, "yes"), properties(4, "no")):
        embed(REAL[5:8], *flags, model=bare)  # so that there is a run of this shape
        assert said(embed(REAL[:5], *flags, model=bare)) == []


def test_another_contact_regression_predicts_other_contacts(
    embed: Callable[..., Answer], small_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copy(small_model, tmp_path / "m.pt"))
    regression = tmp_path / "m-contact-regression.pt"
    shutil.copy(small_model.with_name(f"{small_model.stem}-contact-regression.pt"), regression)
    embed(REAL[:4], "--include", "contacts", model=model)
    content = torch.load(regression, weights_only=False)
    content["model"]["contact_head.regression.bias"] += 1
    torch.save(content, regression)
    assert said(embed(REAL[:4], "--include", "contacts", model=model)) == []


def test_rows_are_copied_for_their_residues_alone(
    embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last barrier: whatever a plan says, and whatever reading gives."""
    embed(REAL[:4])
    fitting = copying._fitting

    def reversed_rows(rows: pa.Table, *arguments: Any) -> pa.Table:  # noqa: ANN401
        return fitting(rows, *arguments).take(pa.array(range(len(rows))[::-1]))

    monkeypatch.setattr(copying, "_fitting", reversed_rows)
    named = said(embed(shuffled(REAL[:4])), "not reused: ")
    assert any("embedded_sha256 is not that of the residues" in line for line in named)


def test_what_is_too_large_for_float16_is_not_rounded_to_it(
    embed: Callable[..., Answer], reusing: Place
) -> None:
    embed(REAL[:4], "--include", "per_tok")
    path = folder(reusing, 1) / "checkpoint-000001.parquet"
    table = pq.read_table(path)
    values, number = table.column("per_tok_2").to_pylist(), table.column_names.index("per_tok_2")
    values[0][0] = 1e6
    field = table.schema.field(number)
    written_again(path, table.set_column(number, field, pa.array(values, field.type)))
    whole = f"sha256 = '{file_sha256(path)}', bytes = {path.stat().st_size}"
    change(reusing, f"UPDATE checkpoints SET {whole} WHERE path = '{path.name}'")
    half = ["--include", "per_tok", "--set", "output.per_tok_dtype=float16"]
    named = said(embed(REAL[:4], *half), "not reused: ")
    assert any("per_tok_2 exceeds" in line for line in named), named


# ---- What is copied


def grown(entries: Entries) -> Entries:
    return [
        *entries,
        ("new1", "MKTAYIAKQRQISFVKSHFSRQ"),
        ("new2", "GGSGGS"),
        ("again", entries[3][1]),
    ]


def shuffled(entries: Entries) -> Entries:
    return random.Random(1).sample(entries, len(entries))


def merged(entries: Entries) -> Entries:
    """Entries of two runs, interleaved, and some under other ids."""
    others = fasta(UNIPROT_PART)[30:40]
    renamed = [(f"copy-{header}", sequence) for header, sequence in entries[::3]]
    return [one for pair in zip(others, entries, strict=False) for one in pair] + renamed


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (grown, "reused: 30 of 32 sequences, from run 1"),
        (lambda entries: shuffled(grown(entries)), "reused: 30 of 32 sequences, from run 1"),
        (lambda entries: entries[4:20], "reused: 16 of 16 sequences, from run 1"),
        (merged, "reused: 26 of 26 sequences, from runs 1 and 2"),
    ],
    ids=["appended", "reordered", "truncated", "merged"],
)
def test_a_changed_file_computes_only_what_is_new(
    script: Script,
    reusing: Place,
    embed: Callable[..., Answer],
    changed: Callable[[Entries], Entries],
    line: str,
) -> None:
    embed(REAL, "--include", *KINDS)
    embed(fasta(UNIPROT_PART)[30:40], "--include", *KINDS)
    entries = changed(REAL)
    answer = embed(entries, "--include", *KINDS)
    assert line in said(answer)[0]
    embed(entries, "--include", *KINDS, "--no-reuse")
    assert_near(folder(reusing, 3), folder(reusing, 4))
    # Bits are those of the source, whoever owns them.
    sources = {row["embedded_sha256"]: row for run in (1, 2) for row in rows(reusing, run)}
    copied = 0
    for row in rows(reusing, 3):
        source = sources.get(row["embedded_sha256"])
        if source is not None:
            copied += 1
            for name in ("mean_2", "bos_2", "per_tok_2", "contacts"):
                assert np.array_equal(row[name], source[name])
    shown = script("query", "select reused, residues_per_second from run_history", "--json").json
    assert [one["reused"] for one in shown] == [0, copied, 0, 0]
    assert (shown[1]["residues_per_second"] is None) == (copied == len(entries))
    assert script("validate", "--run", "3").status == 0


def test_several_files_reuse_what_each_of_them_was(
    script: Script, reusing: Place, embed: Callable[..., Answer], small_model: Path
) -> None:
    embed(REAL[:6])
    embed(REAL[6:12])
    files = [
        write_fasta(reusing.folder / f"{number}.fasta", REAL[part])
        for number, part in enumerate([slice(4, 9), slice(0, 4), slice(9, 14)])
    ]
    flags = ["--esm-model", small_model, *QUICK]
    answer = script("embed", "--input", *files, *flags)
    assert said(answer) == ["reused: 12 of 14 sequences, from runs 1 and 2"]
    assert script("embed", "--input", *files, *flags, "--no-reuse").status == 0
    assert_near(folder(reusing, 3), folder(reusing, 4))


def rows(place: Place, run: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder(place, run)).to_pylist()
    return found


READERS = """
import datasets, duckdb, pandas, polars
files = "embeddings/run-000002/*.parquet"
print(len(pandas.read_parquet("embeddings/run-000002")))
print(len(polars.read_parquet(files)))
print(len(datasets.load_dataset("parquet", data_files=files, split="train")))
print(duckdb.sql(f"SELECT count(DISTINCT sequence_md5) FROM '{files}'").fetchall())
"""


def test_float32_serves_float16_by_rounding_and_not_the_other_way(
    script: Script, reusing: Place, embed: Callable[..., Answer]
) -> None:
    half = ["--include", "per_tok", "--set", "output.per_tok_dtype=float16"]
    embed(REAL[:8], "--include", "mean", "per_tok", "--repr-layers", "1", "2")
    assert said(embed(REAL[:8], *half)) == ["reused: 8 of 8 sequences, from run 1"]
    whole = {row["record"]: row["per_tok_2"] for row in rows(reusing, 1)}
    for row in rows(reusing, 2):
        expected = np.asarray(whole[row["record"]], np.float32).astype(np.float16)
        assert np.array_equal(np.asarray(row["per_tok_2"]), expected)
    change(reusing, "UPDATE runs SET precision = 'float16' WHERE id = 1")
    assert said(embed(REAL[:8], "--include", "per_tok")) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "compute.precision=bfloat16"],
        ["--set", "input.long_sequences=whole"],
        ["--include", "mean", "bos"],
        ["--repr-layers", "1"],
        ["--no-reuse"],
    ],
    ids=lambda flags: flags[-1],
)
def test_what_is_not_the_same_is_computed(embed: Callable[..., Answer], flags: list[str]) -> None:
    embed(REAL[:5])
    assert said(embed(REAL[:5], *flags)) == []


def test_a_compiled_run_serves_compiled_runs_alone(
    reusing: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_compile", lambda _network: None)  # which takes long
    embed(REAL[:5], "--set", "compute.compile=yes")
    answer = embed(REAL[:5])
    assert said(answer) == said(answer, "has these") == []
    # Run 2 is newer.
    answer = embed(REAL[:5], "--set", "compute.compile=yes")
    assert said(answer) == ["reused: 5 of 5 sequences, from run 1"]
    assert said(answer, "has these") == ["run 1 has these vectors"]


def test_another_model_of_the_same_shape_and_name_is_no_source(
    reusing: Place, embed: Callable[..., Answer], other_model: Path
) -> None:
    embed(REAL[:5])
    assert said(embed(REAL[:5], model=other_model)) == []
    # Nor is a run whose row has been made to name the other model.
    change(reusing, "UPDATE runs SET model_id = 2 WHERE id = 1")
    (line,) = said(embed(REAL[:3], model=other_model), "reused")
    assert line == "reused: 3 of 3 sequences, from run 2"


def test_runs_of_version_1_are_no_source_and_say_so(script: Script, reusing: Place) -> None:
    shutil.copytree(DATA / "version_1", reusing.folder, dirs_exist_ok=True)
    assert script("upgrade").status == 0
    change(reusing, f"UPDATE runs SET output_folder = '{reusing.output}/run-00000' || id")
    flags = ["--esm-model", reusing.folder / "esm2_tiny.pt", "--input", SOME_PROTEINS]
    layers = script("query", "select layers, include from run_history where run = 1", "--json").json
    flags += ["--repr-layers", *layers[0]["layers"].split()]
    flags += ["--include", *layers[0]["include"].split()]
    answer = script("embed", *flags)
    assert answer.status == 0, answer.err
    fact = "not reused: runs 1 and 2, whose files have no embedded_sha256"
    assert said(answer, "reused: ") == [fact]
    assert said(script("embed", *flags)) == ["reused: 15 of 15 sequences, from run 4"]


def test_an_unfinished_run_is_a_source(
    script: Script, reusing: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    path = write_fasta(reusing.folder / "first.fasta", REAL)
    flags = ["--esm-model", small_model, "--input", path, *QUICK]
    killed_at(reusing, "lib.ledger.commit.add_checkpoint", 3, "embed", *flags)
    (line,) = said(embed(REAL))
    assert line.endswith(" of 30 sequences, from run 1")
    assert script("resume", "--run", "1").status == 0
    assert_near(folder(reusing, 2), folder(reusing, 1))


def test_a_search_takes_as_much_memory_as_the_estimate_counts() -> None:
    number = 100_000
    drawn = np.random.default_rng(0).integers(0, 2**63, (number, 2), np.uint64)
    shuffled = np.random.default_rng(1).permutation(drawn)
    tracemalloc.start()
    try:
        search = _Search(drawn.copy())
        for start in range(0, number, 1_000):
            search._find(Run(), Checkpoint(), shuffled[start : start + 1_000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert search.missing == 0
    assert 0.9 * SEARCH_BYTES < peak / number < 1.1 * SEARCH_BYTES


# ---- What is on record


def test_the_record_says_from_where(
    script: Script, reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:12])
    embed(REAL[12:20])
    answer = embed(grown(REAL[:20]), "--json")
    assert answer.json["reused"] == {"1": 13, "2": 8}
    assert said(answer) == ["reused: 20 of 22 sequences, from runs 1 and 2"]
    assert "embedding: 20 sequences copied, 28 of 28 residues" in answer.err
    shown = script("history", "--run", "3")
    assert "\nreused               13 records of run 1, 8 of run 2\n" in shown.out
    detail = script("history", "--run", "3", "--json").json
    assert detail["reused"] == 21
    assert detail["percent"] == 100
    for one in detail["checkpoints"]:
        footer = read_footer(folder(reusing, 3) / one["path"])
        if one["reused_run"] is None:
            assert "reused" not in footer
            assert one["residues"] > 0
            continue
        assert one["residues"] == 0
        assert footer["reused"]["run"] == one["reused_run"]
        uuids = script("query", "select id, uuid from runs", "--json").json
        assert {"id": one["reused_run"], "uuid": footer["reused"]["uuid"]} in uuids
        for name in footer["reused"]["files"]:
            assert (folder(reusing, one["reused_run"]) / name).is_file()
    page = reusing.folder / "report.html"
    assert script("report", "--run", "3", "--to", page).status == 0
    assert "13 records of run 1, 8 of run 2" in page.read_text()
    assert " reused " in script("history").out
    usage = script("query", "select records, residues from model_usage", "--json").json
    assert usage == [{"records": 22, "residues": sum(len(s[:120]) for _, s in REAL[:20]) + 28}]


def test_a_row_that_names_another_source_is_found(
    script: Script, reusing: Place, embed: Callable[..., Answer], other_model: Path
) -> None:
    embed(REAL[:5])
    embed(REAL[:5], model=other_model)
    embed(REAL[:5])
    change(reusing, "UPDATE checkpoints SET reused_run_id = 2 WHERE run_id = 3")
    audit = script("query", "select distinct problem from checkpoint_audit where run = 3", "--json")
    assert audit.json == [{"problem": "copied from a run of another model or precision"}]
    answer = script("validate", "--run", "3")
    assert answer.status == 3
    assert "reused_run_id is 2 in the database, 1 in the file's footer" in answer.out


def test_a_sample_has_both_kinds(
    script: Script, reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:6])
    embed(grown(REAL[:6]), "--include", "mean")
    found = script("verify", "--run", "2", "--sample", "1", "--seed", "1", "--json").json
    assert found["good"]
    computed = {6, 7}
    assert {*found["always"]["computed"]} <= computed
    assert not {*found["always"]["copied"]} & computed


def test_copied_runs_read_and_export_like_any_other(
    script: Script, reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:10])
    embed(shuffled(grown(REAL[:10])))
    embed(shuffled(grown(REAL[:10])), "--no-reuse")
    there = folder(reusing, 2)
    assert any(path.name.startswith(".reuse-") for path in there.iterdir())
    one, other = (open_run(reusing.database, run) for run in (2, 3))
    assert one.ids == other.ids
    assert worst_residue_error(one.matrix(), other.matrix()) <= 1e-5
    assert run_program(reusing.folder, READERS).split() == ["13", "13", "13", "[(12,)]"]
    to = reusing.folder / "vectors.npy"
    assert script("export", "--run", "2", "--format", "npy", "--to", to).status == 0
    assert "E" not in script("export", "--run", "2", "--format", "hdf5", "--to", f"{to}.h5").err


# ---- What is lost or altered


def damaged_byte(place: Place) -> None:
    path = folder(place, 1) / "checkpoint-000002.parquet"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def removed(place: Place) -> None:
    (folder(place, 1) / "checkpoint-000002.parquet").unlink()


def exchanged(place: Place) -> None:
    one, other = (folder(place, 1) / f"checkpoint-00000{n}.parquet" for n in (1, 2))
    other.write_bytes(one.read_bytes())


def sha256_changed(place: Place) -> None:
    change(place, "UPDATE checkpoints SET sha256 = 'ab' WHERE path GLOB '*2.parquet'")


def model_changed(place: Place) -> None:
    change(
        place,
        "UPDATE checkpoints SET esm2_config = json_set(esm2_config, '$.sha256', "
        "'0000000000000000000000000000000000000000000000000000000000000000') "
        "WHERE path GLOB '*2.parquet'",
    )


def path_changed(place: Place) -> None:
    change(place, "UPDATE checkpoints SET path = '../x' WHERE path GLOB '*2.parquet'")


ALTERED: dict[Callable[[Place], None], str] = {
    damaged_byte: "sha256 differs from the database",
    removed: "no such regular file",
    exchanged: "checkpoint-000002.parquet: ",
    sha256_changed: "sha256 differs from the database",
    model_changed: "in the checkpoint's row",
    path_changed: "path '../x' is not a checkpoint's name",
}


@pytest.mark.parametrize("alter", ALTERED, ids=lambda one: one.__name__)
def test_a_source_that_is_altered_is_named_and_computed_instead(
    reusing: Place, embed: Callable[..., Answer], alter: Callable[[Place], None]
) -> None:
    embed(REAL[:15])
    alter(reusing)
    answer = embed(shuffled(grown(REAL[:15])))
    (named,) = said(answer, "not reused: ")
    assert ALTERED[alter] in named
    assert ("2.parquet" in named) is (alter is not path_changed)
    reused = [one["reused"] for one in history(reusing)]
    assert 0 < reused[0] < 15
    embed(shuffled(grown(REAL[:15])), "--no-reuse")
    assert_near(folder(reusing, 2), folder(reusing, 3))


def test_a_run_whose_files_are_gone_is_named_once(
    reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:15])
    for path in folder(reusing, 1).glob("checkpoint-*"):
        path.unlink()
    (named,) = said(embed(REAL[:15]), "reused: ")
    assert re.fullmatch(
        r"not reused: run 1: \S+/checkpoint-000001.parquet: no such regular file "
        r"\(and 2 more of this run\)",
        named,
    )


def history(place: Place) -> list[dict[str, int]]:
    with closing(sqlite3.connect(place.database)) as connection:
        connection.row_factory = sqlite3.Row
        return [{**row} for row in connection.execute("SELECT run, reused FROM run_history")]


def test_rows_of_a_run_that_do_not_belong_together_are_no_source(
    reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:5], "--set", "compute.precision=bfloat16")
    change(reusing, "UPDATE runs SET precision = 'float32'")
    (named,) = said(embed(REAL[:5]), "not reused: ")
    assert named.endswith("precision is float32 in the database, bfloat16 in the file's footer")
    change(reusing, "UPDATE runs SET esm2_config = NULL WHERE id = 2")
    change(reusing, "UPDATE runs SET repr_layers = '[1]' WHERE id = 1")
    answer = embed(REAL[:5])
    assert "not reused: run 2: no model metadata (NULL)" in answer.err
    assert "reused: 5 of 5" not in answer.err


def test_a_source_that_goes_in_the_middle_is_computed_from_there(
    reusing: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(REAL[:15])
    true, calls = SourceFiles.verified, 0

    def verified(self: SourceFiles, source: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            removed(reusing)
            for name in ("1", "3"):  # what has been copied is not read again
                assert (folder(reusing, 1) / f"checkpoint-00000{name}.parquet").exists()
        return true(self, source)  # type: ignore[arg-type]

    monkeypatch.setattr(SourceFiles, "verified", verified)
    answer = embed(REAL[:15], "--set", "output.checkpoint_records=100")
    assert len(said(answer, "not reused: ")) == 1
    embed(REAL[:15], "--no-reuse")
    assert_near(folder(reusing, 2), folder(reusing, 3))


def test_a_file_that_changes_while_it_is_read_is_left(
    reusing: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(REAL[:15])
    true = SourceFiles.verified

    def verified(self: SourceFiles, source: object) -> object:
        found = true(self, source)  # type: ignore[arg-type]
        if found.listed.path.name.endswith("2.parquet"):
            damaged_byte(reusing)
        return found

    monkeypatch.setattr(SourceFiles, "verified", verified)
    answer = embed(REAL[:15])
    (named,) = said(answer, "not reused: ")
    assert named.endswith("checkpoint-000002.parquet: changed since it was checked")
    monkeypatch.undo()
    embed(REAL[:15], "--no-reuse")
    assert_near(folder(reusing, 2), folder(reusing, 3))


# ---- What is not loaded


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weights that were loaded by scripts in this process."""
    loaded: list[Path] = []

    def load_network(detection: Detection, *how: Any) -> Any:  # noqa: ANN401
        loaded.append(detection.require_weights().path)
        return esm2.load_network(detection, *how)

    monkeypatch.setattr("lib.jobs.loading.load_network", load_network)
    return loaded


def test_without_a_sequence_to_compute_no_tensor_is_read(
    script: Script,
    reusing: Place,
    small_model: Path,
    embed: Callable[..., Answer],
    loads: list[Path],
) -> None:
    embed(REAL[:15])
    assert loads == [small_model]
    embed(REAL[:15])
    flags = again(reusing, small_model)
    killed_at(reusing, "lib.ledger.commit._row", 2, "embed", *flags)
    assert script("resume", "--run", "3").status == 0
    assert loads == [small_model]
    model = "SELECT DISTINCT m.sha256 FROM runs JOIN models AS m ON m.id = model_id"
    assert len(ask(reusing, model)) == 1
    for run in (2, 3):
        assert_same_bits(folder(reusing, run), folder(reusing, 1))
        assert script("validate", "--run", str(run)).status == 0
    # One new sequence is enough, and so is a source that goes after it was planned to be copied.
    loads.clear()  # of validate, which tries the model
    embed(REAL[:16])
    assert loads == [small_model]


@pytest.mark.parametrize(("left", "times"), [(10**8, 2), (10**9, 1), (None, 1)])
def test_where_memory_is_short_weights_are_loaded_again_after_copying(
    reusing: Place,
    embed: Callable[..., Answer],
    loads: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    left: int | None,
    times: int,
) -> None:
    embed(REAL[:15])
    loads.clear()
    given_back: list[int] = []  # how often the weights were loaded before each time
    monkeypatch.setattr("lib.jobs.embedding.available_bytes", lambda *_: left)
    monkeypatch.setattr("lib.jobs.embedding.give_back", lambda: given_back.append(len(loads)))
    embed(REAL[:20])
    assert len(loads) == times
    assert given_back == [1] * 3  # for each of three files of five copied rows
    embed(REAL[:20], "--no-reuse")
    assert_near(folder(reusing, 2), folder(reusing, 3))


def test_a_resumed_run_loads_weights_again_where_memory_is_short(
    script: Script,
    reusing: Place,
    small_model: Path,
    embed: Callable[..., Answer],
    loads: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embed(REAL[:15])
    write_fasta(reusing.folder / "input.fasta", REAL[:20])
    flags = again(reusing, small_model)
    killed_at(reusing, "lib.ledger.commit._row", 2, "embed", *flags)
    loads.clear()
    monkeypatch.setattr("lib.jobs.embedding.available_bytes", lambda *_: 0)
    assert script("resume", "--run", "2").status == 0
    assert loads == [small_model] * 2
    assert len(open_run(reusing.database, 2)) == 20


def test_what_is_copied_does_not_drive_code_out_of_memory(
    reusing: Place, embed: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input, sources and new files are not kept in memory as if they were in use."""
    asked: list[str] = []
    true = os.posix_fadvise

    def posix_fadvise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert (start, size, advice) == (0, 0, os.POSIX_FADV_NOREUSE)
        asked.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        true(descriptor, start, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    embed(REAL[:5])
    assert {"input.fasta", ".attempt-1-0.parquet.tmp"} == {*asked}
    asked.clear()
    embed(REAL[:6])
    assert {"checkpoint-000001.parquet", ".attempt-2-0.parquet.tmp"} < {*asked}

    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, "no such advice for this file")

    monkeypatch.setattr(os, "posix_fadvise", refused)
    embed(REAL[:7])
    monkeypatch.delattr(os, "posix_fadvise")
    embed(REAL[:8])


def test_weights_that_change_before_they_are_needed_are_refused(
    script: Script,
    reusing: Place,
    embed: Callable[..., Answer],
    small_model: Path,
    other_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = reusing.folder / "own" / small_model.name
    model.parent.mkdir()
    shutil.copy(small_model, model)
    embed(REAL[:15], model=model)

    def verified(*_: object) -> object:
        shutil.copy(other_model, model)
        raise LostSourceError("gone after it was planned to be copied")

    monkeypatch.setattr(SourceFiles, "verified", verified)
    flags = again(reusing, model)
    answer = script("embed", *flags)
    assert (answer.status, answer.error) == (2, f"{model}: changed while it was being read")
    assert ask(reusing, "SELECT status FROM runs WHERE id = 2") == [("failed",)]
    monkeypatch.undo()
    shutil.copy(small_model, model)
    assert script("resume", "--run", "2", "--config", reusing.config).status == 0
    assert_same_bits(folder(reusing, 2), folder(reusing, 1))


# ---- Interrupted and resumed


def killed_at(place: Place, target: str, nth: int, script: str, *argv: object) -> None:
    """Run a script that kills itself before the nth call of a function."""
    dying = partial(processes.at_call, target, nth, processes.die)
    done = processes.run(script, *argv, "--config", place.config, prepare=dying)
    assert done.status == -signal.SIGKILL, (target, done)


STEPS = [
    ("lib.ledger.runs._attempt", 1),
    ("lib.jobs.stretches.CheckpointWriter", 2),
    ("lib.jobs.stretches.CheckpointWriter.finish", 2),
    ("lib.ledger.commit.rename_into_place", 2),
    ("lib.ledger.commit._row", 2),
    ("lib.ledger.commit.show_alive", 3),
    ("lib.network.pipeline.launch", 1),
    ("lib.network.pipeline.launch", 2),
    ("lib.jobs.embedding.finish_run", 1),
]


def test_killed_at_each_step_and_resumed_gives_the_same_bits(
    script: Script, reusing: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:15], "--include", "mean", "per_tok")
    # What run 2 copies from run 1 only: the database as it is now, for each trial.
    path = write_fasta(reusing.folder / "grown.fasta", shuffled(grown(REAL[:22])))
    before = reusing.database.read_bytes()
    flags = ["--esm-model", small_model, "--input", path, "--include", "mean", "per_tok", *QUICK]
    assert script("embed", *flags).status == 0
    kept = folder(reusing, 2).rename(reusing.folder / "expected")
    for step in STEPS:
        for part in ("-wal", "-shm"):
            Path(f"{reusing.database}{part}").unlink(missing_ok=True)
        reusing.database.write_bytes(before)
        killed_at(reusing, *step, "embed", *flags)
        if len(history(reusing)) == 1:  # killed before it was on record
            answer = script("embed", *flags)
        else:
            answer = script("resume", "--run", "2")
        assert answer.status == 0, (step, answer.err)
        assert "reused: 15 of 24 sequences, from run 1" in answer.err
        assert_same_bits(folder(reusing, 2), kept)
        assert script("validate", "--run", "2").status == 0
        folder(reusing, 2).rename(reusing.folder / f"tried-{STEPS.index(step)}")


def test_what_is_computed_instead_has_the_same_bits_after_a_kill(
    script: Script, reusing: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:15])
    change(reusing, "UPDATE checkpoints SET sha256 = 'ab', bytes = bytes WHERE id < 3")
    answer = embed(REAL[:18])
    assert len(said(answer, "not reused: ")) == 2
    path = reusing.folder / "input.fasta"
    flags = ["--esm-model", small_model, "--input", path, *QUICK]
    change(reusing, "UPDATE runs SET long_sequences = 'error' WHERE id = 2")  # no source for 3
    killed_at(reusing, "lib.network.pipeline.launch", 3, "embed", *flags)
    answer = script("resume", "--run", "3")
    assert answer.status == 0, answer.err
    assert_same_bits(folder(reusing, 3), folder(reusing, 2))
    assert said(answer, "not reused: ")


def test_a_signal_while_copying_commits_what_is_copied(
    script: Script, reusing: Place, small_model: Path, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:15])
    flags = again(reusing, small_model)
    gate = reusing.folder / "gate"
    target = "lib.jobs.stretches.CheckpointWriter.finish"
    prepare = partial(processes.stop_at, target, 2, gate)
    with processes.start("embed", *flags, "--config", reusing.config, prepare=prepare) as process:
        process.wait_for("reached")
        process.send_signal(signal.SIGINT)
        process.wait_for("received")
        gate.touch()
        answer = process.end()
    assert answer.status == 130, answer.err
    shown = script("history", "--run", "2", "--json").json
    assert shown["status"] == "interrupted"
    assert 0 < shown["reused"] < 15
    assert script("resume").status == 0
    assert_same_bits(folder(reusing, 2), folder(reusing, 1))


def test_copied_files_are_adopted_when_the_database_was_restored(
    script: Script,
    reusing: Place,
    small_model: Path,
    embed: Callable[..., Answer],
    reading_threads: set[int],
) -> None:
    embed(REAL[:15])
    path = write_fasta(reusing.folder / "grown.fasta", shuffled(grown(REAL[:15])))
    flags = ["--esm-model", small_model, "--input", path, *QUICK]
    killed_at(reusing, "lib.ledger.commit.show_alive", 2, "embed", *flags)
    before = reusing.database.read_bytes()
    assert script("resume", "--run", "2").status == 0
    rows = "SELECT path, sha256, residues, residues_reused, reused_run_id FROM checkpoints"
    expected = ask(reusing, rows)
    reusing.database.write_bytes(before)
    for part in ("-wal", "-shm"):
        Path(f"{reusing.database}{part}").unlink(missing_ok=True)
    answer = script("resume", "--run", "2")
    assert answer.status == 0, answer.err
    assert len(said(answer, "verified and adopted")) == len(expected) - 4
    assert sorted(ask(reusing, rows)) == sorted(expected)
    assert script("validate", "--run", "2").status == 0
    # Plan, sources and adopted files.
    assert reading_threads == {threading.get_native_id()}


def ask(place: Place, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(place.database)) as connection:
        return connection.execute(statement).fetchall()


@pytest.mark.parametrize("how", ["lost", "altered", "forgotten"])
def test_without_its_plan_a_run_is_refused(
    script: Script, reusing: Place, embed: Callable[..., Answer], how: str
) -> None:
    embed(REAL[:15])
    embed(grown(REAL[:15]))
    (plan,) = folder(reusing, 2).glob(".reuse-*")
    if how == "lost":
        plan.unlink()
        fact = f"run 2: reuse plan {plan.name}: no such regular file"
    elif how == "altered":
        plan.write_bytes(plan.read_bytes()[:-9] + b"x" + plan.read_bytes()[-8:])
        fact = f"run 2: reuse plan {plan.name}: its bytes do not match their digest"
    else:
        change(reusing, "UPDATE runs SET reuse_sha256 = NULL WHERE id = 2")
        fact = "in the file's footer"
    for flags in ([], ["--recompute-damaged"]):
        answer = script("resume", "--run", "2", *flags)
        assert answer.status == 3
        assert fact in answer.error
    assert script("validate", "--run", "2").status == 3
    # Reading needs no plan, and a new run takes over what it can.
    assert len(open_run(reusing.database, 2)) == 18
    taken = said(embed(grown(REAL[:15])), "reused: 17 of 17")
    assert len(taken) == (0 if how == "forgotten" else 1)


def test_a_damaged_copy_is_copied_again(
    script: Script, reusing: Place, embed: Callable[..., Answer]
) -> None:
    embed(REAL[:15])
    embed(grown(REAL[:15]))
    expected = reusing.folder / "expected"
    folder(reusing, 2).rename(expected)
    shutil.copytree(expected, folder(reusing, 2))
    path = folder(reusing, 2) / "checkpoint-000002.parquet"
    path.write_bytes(b"nothing")
    assert script("resume", "--run", "2").status == 3
    answer = script("resume", "--run", "2", "--recompute-damaged")
    assert answer.status == 0, answer.err
    assert_same_bits(folder(reusing, 2), expected)
    assert script("history", "--run", "2", "--json").json["reused"] == 16
