"""Identity: if this fails, a run can mix the vectors of two models and nobody will know.

Each case attacks a half-finished run with raw SQL or a hex editor. resume.py and
validate.py --run must stop with status 3 and name the difference, before a tensor is read.
"""

from __future__ import annotations

import gc
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from lib.errors import InterruptedRunError
from lib.jobs import loading
from lib.ledger import commit
from lib.models.untrained import make_model
from lib.network import esm2 as network
from schema.tables import Checkpoint
from tests.conftest import UNIPROT_PART, Answer, Once, Place, Script


def half_a_run(script: Script, model: Path, source: Path) -> None:
    """Start a run that is interrupted after two checkpoints."""
    committed = 0

    true_add = commit.add_checkpoint

    def add(*arguments: Any) -> Checkpoint:  # noqa: ANN401
        nonlocal committed
        row = true_add(*arguments)
        committed += 1
        if committed == 2:
            raise InterruptedRunError("SIGINT: as if", 2)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "add_checkpoint", add)
        patch.setattr(loading, "load_network", network.load_network)
        answer = script(
            "embed", "--esm-model", model, "--input", source, "--repr-layers", "1", "2",
            "--set", "output.checkpoint_records=6", "--set", "compute.tokens_per_pack=450",
        )  # fmt: skip
    assert answer.status == 130, answer.err


@pytest.fixture
def attacked(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, once: Once
) -> Place:
    """Run 1 with two checkpoints, interrupted; its weights and input are copies in the place."""

    def embed_half() -> None:
        weights = place.folder / "weights.pt"
        shutil.copy(small_model, weights)
        shutil.copy(UNIPROT_PART, place.folder / "input.fasta")
        half_a_run(script, weights, place.folder / "input.fasta")

    once(embed_half)

    def read(*_: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(loading, "load_network", read)
    return place


def sql(place: Place, statement: str, *values: object) -> None:
    """Change the run database behind the program's back."""
    with closing(sqlite3.connect(place.database)) as connection, connection:
        assert connection.execute(statement, values).rowcount > 0


def assert_refused(script: Script, fact: str, *flags: str | Path) -> None:
    for name in ("resume", "validate"):
        answer: Answer = script(name, "--run", "1", *flags)
        assert answer.status == 3, (name, answer.out, answer.err)
        said = answer.out or answer.error
        assert fact in said, (name, said)
        assert "Traceback" not in answer.err


ROWS = {
    "a checkpoint row with NULL metadata": (
        "UPDATE checkpoints SET esm2_config = NULL WHERE first_position > 0",
        "checkpoint-000002.parquet: no model metadata (NULL)",
    ),
    "a run row with NULL metadata": (
        "UPDATE runs SET esm2_config = NULL",
        "run 1: no model metadata (NULL)",
    ),
    "a run row without a model": (
        "UPDATE runs SET model_id = NULL",
        "run 1: model_id is None: no such model",
    ),
    "a missing key in a run's snapshot": (
        "UPDATE runs SET esm2_config = json_remove(esm2_config, '$.attention_heads')",
        "run 1: model metadata lacks attention_heads",
    ),
    "a missing key in a checkpoint's snapshot": (
        "UPDATE checkpoints SET esm2_config = json_remove(esm2_config, '$.sha256')",
        "model metadata lacks sha256",
    ),
    "an unknown key in a snapshot": (
        "UPDATE checkpoints SET esm2_config = json_set(esm2_config, '$.extra', 1)",
        "model metadata has extra = 1",
    ),
    "a number written as text in a snapshot": (
        "UPDATE runs SET esm2_config = json_set(esm2_config, '$.hidden_dim', '64')",
        "model metadata has hidden_dim = '64'",
    ),
    "a snapshot that is no JSON": (
        "UPDATE runs SET esm2_config = '{broken'",
        "run 1: metadata is not JSON",
    ),
    "a snapshot that is no object": (
        "UPDATE runs SET esm2_config = '[1]'",
        "run 1: runs.esm2_config is [1], not dict",
    ),
    "a checkpoint row of another model": (
        "UPDATE checkpoints SET esm2_config = json_set(esm2_config, '$.hidden_dim', 128)",
        "hidden_dim is 64 in the run, 128 in the checkpoint's row",
    ),
    "another digest in a checkpoint row": (
        f"UPDATE checkpoints SET esm2_config = json_set(esm2_config, '$.sha256', '{'0' * 64}')",
        f"{'0' * 64} in the checkpoint's row",
    ),
    "another digest in models": (
        f"UPDATE models SET sha256 = '{'0' * 64}'",
        f"{'0' * 64} in models",
    ),
    "NULL in models": ("UPDATE models SET hidden_dim = NULL", "None in models"),
    "other repr_layers in the row than in the snapshot": (
        "UPDATE runs SET repr_layers = '[0, 2]'",
        "run 1: repr_layers is [0, 2] in the row, [1, 2] in its model metadata",
    ),
    "other repr_layers in row and snapshot than in the footer": (
        "UPDATE runs SET repr_layers = '[0, 2]', "
        "esm2_config = json_set(esm2_config, '$.repr_layers', json('[0, 2]'))",
        "repr_layers",
    ),
    "another include": ("UPDATE runs SET include = '[\"bos\"]'", "include is ['bos'] in the run"),
    "another truncation": ("UPDATE runs SET max_residues = 50", "max_residues is 50 in the run"),
    "another plan": (
        "UPDATE runs SET plan = 'by chance'",
        "run 1: plan is 'by chance', this program's",
    ),
    "another uuid": ("UPDATE runs SET uuid = 'x'", "uuid is x in the database"),
    "another network, compiled": (
        "UPDATE runs SET settings = json_set(settings, '$.compute.compile', json('true'))",
        "compile is True in the database, False in the file's footer",
    ),
    "broken settings": ("UPDATE runs SET settings = '[]'", "run 1: runs.settings is [], not dict"),
    "overlapping positions": (
        "UPDATE checkpoints SET first_position = first_position - 1 WHERE first_position > 0",
        "its positions overlap",
    ),
    "other positions": (
        "UPDATE checkpoints SET stop_position = stop_position + 1 WHERE first_position > 0",
        "in the file's footer",
    ),
    "positions beyond the input": (
        "UPDATE checkpoints SET stop_position = 1000 WHERE first_position > 0",
        "checkpoints reach position 1000 of",
    ),
    "text where a number belongs": (
        "UPDATE checkpoints SET residues = 'x1'",
        "run 1: checkpoints.residues is 'x1', not int",
    ),
    "bytes where text belongs": (
        "UPDATE runs SET output_folder = x'ff'",
        "run 1: runs.output_folder is b'\\xff', not str",
    ),
    "a number for the kinds": ("UPDATE runs SET include = '7'", "runs.include is 7, not list"),
    "a number for the versions": (
        "UPDATE attempts SET versions = '7'",
        "run 1: attempts.versions is 7, not dict",
    ),
    "brackets in brackets": (
        f"UPDATE attempts SET versions = '{'[' * 100_000}{']' * 100_000}'",
        "run 1: metadata is not JSON",
    ),
    "columns without digests": (
        "UPDATE runs SET has_digests = NULL",
        "its columns are not those of the run",
    ),
    "other records": (
        "UPDATE checkpoints SET records = records + 5 WHERE first_position = 0",
        "in the file's footer",
    ),
    "no record truncated": (
        "UPDATE runs SET records_truncated = records_truncated + 1",
        "records_truncated is 2 in the database, 1 in the file's footer",
    ),
    "a path out of the folder": (
        "UPDATE checkpoints SET path = '../../etc/passwd' WHERE first_position > 0",
        "is not a checkpoint's name",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_changed_with_sql_is_refused(script: Script, attacked: Place, case: str) -> None:
    statement, fact = ROWS[case]
    sql(attacked, statement)
    assert_refused(script, fact)


def test_other_repr_layers_in_every_row_than_in_the_footer(script: Script, attacked: Place) -> None:
    sql(attacked, "UPDATE runs SET repr_layers = '[0, 2]'")
    for table in ("runs", "checkpoints"):
        layers = "json_set(esm2_config, '$.repr_layers', json('[0, 2]'))"
        sql(attacked, f"UPDATE {table} SET esm2_config = {layers}")
    assert_refused(script, "repr_layers is [0, 2] in the database, [1, 2] in the file's footer")


def test_another_model_of_other_shape(script: Script, attacked: Place, tall_model: Path) -> None:
    assert_refused(
        script, f"num_layers is 2 in the run, 3 in {tall_model}", "--esm-model", tall_model
    )


def test_a_shallower_model_is_another_model_not_a_bad_layer(
    script: Script, attacked: Place
) -> None:
    shallow = attacked.folder / "esm2_shallow.pt"
    make_model(shallow, 1, 64, 4)
    assert_refused(script, "num_layers is 2 in the run, 1 in", "--esm-model", shallow)


def test_a_released_name_is_another_model(script: Script, attacked: Place) -> None:
    fact = "num_layers is 2 in the run, 33 in the catalog (esm2_t33_650M_UR50D)"
    assert_refused(script, fact, "--esm-model", "esm2_t33_650M_UR50D")


def test_a_fine_tune_of_the_same_shape(script: Script, attacked: Place, other_model: Path) -> None:
    assert_refused(script, "sha256 of the weights is", "--esm-model", other_model)


def test_the_same_shape_with_other_heads(script: Script, attacked: Place) -> None:
    fewer = attacked.folder / "esm2_fewer.pt"
    make_model(fewer, 2, 64, 2)
    assert_refused(script, "attention_heads is 4 in the run, 2 in", "--esm-model", fewer)


def test_the_same_file_with_one_weight_changed(script: Script, attacked: Place) -> None:
    weights = attacked.folder / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert_refused(script, "sha256 of the weights is")


def test_the_same_tensors_saved_again_in_another_type(script: Script, attacked: Place) -> None:
    half = attacked.folder / "esm2_half.pt"
    make_model(half, 2, 64, 4, dtype=torch.float16)
    assert_refused(script, "dtype is float32 in the run, float16 in", "--esm-model", half)


def test_a_checkpoint_swapped_with_another_runs(
    script: Script, attacked: Place, small_model: Path
) -> None:
    half_a_run(script, small_model, UNIPROT_PART)
    one = attacked.output / "run-000001" / "checkpoint-000001.parquet"
    other = attacked.output / "run-000002" / "checkpoint-000001.parquet"
    swap(one, other)
    assert_refused(script, "checkpoint-000001.parquet: uuid is")
    recompute = script("resume", "--run", "1", "--recompute-damaged")
    assert recompute.status == 3
    assert one.exists()


def test_checkpoints_swapped_within_a_run(script: Script, attacked: Place) -> None:
    folder = attacked.output / "run-000001"
    swap(folder / "checkpoint-000001.parquet", folder / "checkpoint-000002.parquet")
    assert_refused(script, "first_position is 0 in the database")


def test_a_footer_changed_with_a_hex_editor(script: Script, attacked: Place) -> None:
    file = attacked.output / "run-000001" / "checkpoint-000001.parquet"
    content = file.read_bytes()
    # Text of the same length, so that the file stays readable.
    assert b'"hidden_dim": 64' in content
    file.write_bytes(content.replace(b'"hidden_dim": 64', b'"hidden_dim": 65'))
    footer = json.loads(pq.read_metadata(file).metadata[b"esm_ledger"])
    assert footer["identity"]["esm2_config"]["hidden_dim"] == 65
    assert_refused(script, "esm2_config.hidden_dim is 64 in the database, 65 in the file's footer")


def test_a_changed_fasta(script: Script, attacked: Place) -> None:
    fasta = attacked.folder / "input.fasta"
    fasta.write_text(fasta.read_text().replace("MA", "MG", 1))
    assert_refused(script, "sha256 of the input is")


def test_a_fasta_that_changed_and_became_invalid(script: Script, attacked: Place) -> None:
    fasta = attacked.folder / "input.fasta"
    fasta.write_text(fasta.read_text().replace("MA", "M1", 1))
    assert_refused(script, "sha256 of the input is")


def test_a_fasta_with_a_record_more(script: Script, attacked: Place) -> None:
    with (attacked.folder / "input.fasta").open("a") as file:
        file.write(">one_more\nMKLV\n")
    assert_refused(script, "sha256 of the input is")


def test_a_stray_file_of_another_run_is_refused_not_removed(
    script: Script, attacked: Place, small_model: Path
) -> None:
    half_a_run(script, small_model, UNIPROT_PART)
    moved = attacked.output / "run-000001" / "checkpoint-000009.parquet"
    shutil.copy(attacked.output / "run-000002" / "checkpoint-000001.parquet", moved)
    answer = script("resume", "--run", "1", "--config", attacked.config)
    assert answer.status == 3
    assert "checkpoint-000009.parquet: made by run uuid" in answer.error
    assert moved.exists()


def test_validate_names_every_fault_not_only_the_first(script: Script, attacked: Place) -> None:
    sql(attacked, "UPDATE checkpoints SET esm2_config = NULL")
    fasta = attacked.folder / "input.fasta"
    fasta.write_text(fasta.read_text().replace("MA", "MG", 1))
    answer = script("validate", "--run", "1")
    assert answer.status == 3
    for fact in ("checkpoint-000001", "checkpoint-000002", "sha256 of the input"):
        assert fact in answer.out


def test_validate_without_a_run_says_which_unfinished_runs_this_model_can_continue(
    script: Script, place: Place, small_model: Path, other_model: Path
) -> None:
    for model in (small_model, other_model, small_model):
        half_a_run(script, model, UNIPROT_PART)
    sql(place, "UPDATE checkpoints SET esm2_config = NULL WHERE run_id = 3")
    gc.collect()  # a connection of a run before that closes only now would write to the file
    before = place.database.read_bytes()
    answer = script("validate", "--esm-model", small_model)
    assert answer.status == 0
    lines = answer.out.splitlines()[-3:]
    assert lines[0].startswith("unfinished run 3: cannot: run 3: checkpoint-000001.parquet: no mod")
    assert lines[1].startswith("unfinished run 2: cannot: run 2: sha256 of the weights is")
    assert lines[2] == "unfinished run 1: can be resumed with this model"
    assert place.database.read_bytes() == before


def swap(one: Path, other: Path) -> None:
    """Exchange two files' places."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
