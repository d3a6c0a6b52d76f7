"""Embedding end to end: if this fails, a user's Parquet files hold something else than ESM-2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import MachineError
from lib.ledger import commit
from lib.ledger.checkpoints import FinishedStretch
from lib.ledger.ownership import take_lock
from tests.conftest import SOME_PROTEINS, UNIPROT_PART, WHOLE_PROTEINS, Place, Script
from tests.reference import (
    Reference,
    assert_same_bits,
    fasta,
    read_run,
    worst_residue_error,
    write_fasta,
)

BOUND = 1e-5


@pytest.mark.parametrize("source", [WHOLE_PROTEINS, UNIPROT_PART])
def test_all_vectors_of_real_proteins_equal_fair_esm(
    script: Script, place: Place, small_model: Path, source: Path
) -> None:
    kinds = ["mean", "bos", "per_tok"]
    answer = script(
        "embed", "--esm-model", small_model, "--input", source, "--json",
        "--repr-layers", "0", "1", "-1", "--include", *kinds,
    )  # fmt: skip
    assert answer.status == 0, answer.err
    rows = read_run(Path(answer.json["output_folder"]))
    entries = fasta(source)
    assert sorted(rows) == list(range(len(entries)))
    reference = Reference(small_model)
    for number, (header, sequence) in enumerate(entries):
        row = rows[number]
        name, _, description = header.partition(" ")
        assert (row["id"], row["description"]) == (name, description.strip())
        assert (row["length"], row["embedded_length"]) == (len(sequence), min(1022, len(sequence)))
        for layer, tokens in reference.tokens(sequence[:1022], [0, 1, 2]).items():
            residues = tokens[1:-1]
            per_tok = row[f"per_tok_{layer}"]
            assert isinstance(per_tok, np.ndarray)
            assert worst_residue_error(per_tok.reshape(residues.shape), residues) <= BOUND
            for kind, truth in (("mean", residues.mean(0)), ("bos", tokens[0])):
                pooled = row[f"{kind}_{layer}"]
                assert isinstance(pooled, np.ndarray)
                assert worst_residue_error(pooled[None], truth[None]) <= BOUND


def test_columns_have_the_types_of_the_design(
    script: Script, place: Place, small_model: Path
) -> None:
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--json",
        "--include", "mean", "per_tok", "--set", "output.per_tok_dtype=float16",
    )  # fmt: skip
    folder = Path(answer.json["output_folder"])
    assert folder == place.output / "run-000001"
    schema = pq.read_table(folder).schema
    assert schema.names == [
        "record", "id", "description", "length", "embedded_length", "embedded_sha256",
        "sequence_md5", "mean_2", "per_tok_2",
    ]  # fmt: skip
    assert schema.field("record").type == pa.int64()
    assert schema.field("length").type == pa.int32()
    assert schema.field("embedded_sha256").type == pa.binary(32)
    assert schema.field("sequence_md5").type == pa.string()
    assert schema.field("mean_2").type == pa.list_(pa.float32(), 64)
    assert schema.field("per_tok_2").type == pa.list_(pa.float16())


def test_auto_is_resolved_shown_with_its_reason_and_recorded(
    script: Script, place: Place, small_model: Path
) -> None:
    place.set("compute", "device", "cpu")
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    for shown in ("precision float32 (auto: float32 on CPU", "2048 tokens per pack (auto: cpu)"):
        assert shown in answer.err
    statement = "select precision, settings ->> '$.compute.tokens_per_pack' as n from runs"
    assert script("query", statement, "--json").json == [{"precision": "float32", "n": 2048}]


@pytest.mark.parametrize(
    ("precision", "bound"), [("bfloat16", 2e-2), ("float16", 3e-3), ("float32", 1e-5)]
)
def test_every_precision_keeps_its_bound_to_the_file(
    script: Script, place: Place, small_model: Path, precision: str, bound: float
) -> None:
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--include", "per_tok",
        "--set", f"compute.precision={precision}",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    rows, reference = read_run(place.output / "run-000001"), Reference(small_model)
    for number, (_, sequence) in enumerate(fasta(SOME_PROTEINS)):
        truth = reference.tokens(sequence, [2])[2][1:-1]
        found = rows[number]["per_tok_2"]
        assert isinstance(found, np.ndarray)
        assert worst_residue_error(found.reshape(truth.shape), truth) <= bound


def test_identical_sequences_get_the_same_vectors_and_are_computed_once(
    script: Script, place: Place, small_model: Path
) -> None:
    twin = "MKTAYIAKQRQISFVKSHFSRQ"
    source = write_fasta(
        place.folder / "twins.fasta",
        [("a", twin), ("b", "MKLV"), ("c", twin.lower()), ("d", twin + "*")],
    )
    answer = script("embed", "--esm-model", small_model, "--input", source, "--json")
    assert "4 records, 2 different sequences, 26 residues" in answer.err
    rows = read_run(place.output / "run-000001")
    assert [rows[i]["id"] for i in range(4)] == ["a", "b", "c", "d"]
    for other in (2, 3):
        np.testing.assert_array_equal(rows[0]["mean_2"], rows[other]["mean_2"])
    assert not np.array_equal(rows[0]["mean_2"], rows[1]["mean_2"])


def test_truncation_is_counted_and_each_row_has_both_lengths(
    script: Script, place: Place, small_model: Path
) -> None:
    source = write_fasta(place.folder / "long.fasta", [("long", "MKLV" * 300), ("short", "MKLV")])
    answer = script("embed", "--esm-model", small_model, "--input", source)
    assert "truncated to 1022 residues: 1 record" in answer.err
    rows = read_run(place.output / "run-000001")
    assert (rows[0]["length"], rows[0]["embedded_length"]) == (1200, 1022)
    assert (rows[1]["length"], rows[1]["embedded_length"]) == (4, 4)


def test_the_footer_carries_model_settings_input_and_writer(
    script: Script, place: Place, small_model: Path
) -> None:
    script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    (file,) = (place.output / "run-000001").glob("*.parquet")
    footer = json.loads(pq.read_metadata(file).metadata[b"esm_ledger"])
    config = footer["identity"]["esm2_config"]
    assert (config["name"], config["num_layers"], config["hidden_dim"]) == ("esm2_small", 2, 64)
    assert len(config["sha256"]) == len(footer["identity"]["input_sha256"]) == 64
    assert footer["settings"]["input"]["max_residues"] == 1022
    assert footer["writer"].startswith("esm-ledger ")


def test_pages_have_checksums_that_are_verified(
    script: Script, place: Place, small_model: Path
) -> None:
    script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    (file,) = (place.output / "run-000001").glob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(file, page_checksum_verification=True)


def test_checkpoints_are_cut_by_records(script: Script, place: Place, small_model: Path) -> None:
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--json",
        "--set", "output.checkpoint_records=4", "--set", "compute.tokens_per_pack=300",
    )  # fmt: skip
    assert len(answer.json["checkpoints"]) > 2
    script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
           "--set", "compute.tokens_per_pack=300")  # fmt: skip
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_checkpoints_are_cut_by_seconds(script: Script, place: Place, small_model: Path) -> None:
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--json",
        "--set", "output.checkpoint_seconds=0", "--set", "compute.tokens_per_pack=300",
    )  # fmt: skip
    assert len(answer.json["checkpoints"]) > 4


def test_results_go_to_stdout_and_the_rest_to_stderr(place: Place, small_model: Path) -> None:
    answer = place.run("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    assert answer.out.splitlines() == [
        f"run 1 finished: 15 records in 1 checkpoint in {place.output / 'run-000001'} "
        "(untrained weights)"
    ]
    for shown in ("checkpoint metadata, tensor shapes", "device cpu", "res/s", "run 1"):
        assert shown in answer.err


def test_two_models_side_by_side_in_one_database(
    script: Script, place: Place, small_model: Path, tall_model: Path
) -> None:
    for model in (small_model, tall_model):
        assert script("embed", "--esm-model", model, "--input", SOME_PROTEINS).status == 0
    for folder, model, layer in (("run-000001", small_model, 2), ("run-000002", tall_model, 3)):
        rows, reference = read_run(place.output / folder), Reference(model)
        for number, (_, sequence) in enumerate(fasta(SOME_PROTEINS)):
            truth = reference.tokens(sequence, [layer])[layer][1:-1].mean(0)
            found = rows[number][f"mean_{layer}"]
            assert isinstance(found, np.ndarray)
            assert worst_residue_error(found[None], truth[None]) <= BOUND
    history = script("history", "--json").json
    assert [(run["run"], run["model"]) for run in history] == [
        (2, "esm2_tall (untrained)"),
        (1, "esm2_small (untrained)"),
    ]


def test_a_run_that_fails_before_it_starts_leaves_no_run(
    script: Script, place: Place, small_model: Path
) -> None:
    source = write_fasta(place.folder / "bad.fasta", [("good", "MKLV"), ("bad", "MK1V")])
    answer = script("embed", "--esm-model", small_model, "--input", source)
    assert answer.status == 2
    assert answer.error == "record 1 (bad): '1' at residue 3 is not in the ESM-2 alphabet"
    assert not place.output.exists()
    assert not place.database.exists()


def fail(*_: object) -> None:
    raise MachineError("the disk failed")


def test_a_new_run_takes_the_next_number_whose_folder_is_free(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--json"]
    (place.output / "run-000001").mkdir(parents=True)
    (place.output / "run-000001" / "mine.txt").write_text("mine")
    (place.output / "run-000002").write_text("a file")
    with monkeypatch.context() as failing:
        failing.setattr("lib.ledger.runs.keep_in_folder", fail)
        assert script("embed", *flags).status == 4
    assert (place.output / "run-000003" / ".lock").exists()  # of a start that died
    (place.output / "run-000004").mkdir()
    with take_lock(place.output / "run-000004"):  # of a run of another database
        assert [script("embed", *flags).json["run"] for _ in range(2)] == [3, 5]
    assert (place.output / "run-000001" / "mine.txt").read_text() == "mine"
    assert [*(place.output / "run-000001").iterdir()] == [place.output / "run-000001" / "mine.txt"]
    assert [one["run"] for one in script("history", "--json").json] == [5, 3]


def test_a_new_database_beside_old_output_goes_on_counting(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    assert script("embed", *flags).status == 0
    place.database.unlink()
    answer = script("embed", *flags)
    assert answer.status == 0, answer.err
    assert answer.out.startswith("run 2 finished: ")
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_non_finite_values_stop_the_run_and_name_the_record(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    from lib.network import pooling

    true_mean = pooling.mean
    third_longest = sorted(range(15), key=lambda i: -len(fasta(SOME_PROTEINS)[i][1]))[2]
    name, residues = fasta(SOME_PROTEINS)[third_longest]

    def spoiled(hidden: Any, groups: Any) -> Any:  # noqa: ANN401
        result = true_mean(hidden, groups)
        if [group.tokens for group in groups] == [len(residues) + 2]:
            result[0, 5] = float(value)
        return result

    monkeypatch.setattr(pooling, "mean", spoiled)
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
        "--set", "compute.tokens_per_pack=10",
    )  # fmt: skip
    assert answer.status == 2
    place_of = f"record {third_longest} ({name.split()[0]})"
    assert answer.error == f"{place_of}: non-finite value in mean of layer 2"
    monkeypatch.undo()
    (run,) = script("history", "--json").json
    assert (run["status"], run["records_done"]) == ("failed", 2)
    assert script("resume", "--run", "1").status == 0
    assert len(read_run(place.output / "run-000001")) == 15


def test_no_position_is_committed_twice(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = commit.Committer.commit

    def twice(self: commit.Committer, stretch: FinishedStretch) -> None:
        once(self, stretch)
        other = place.output / "run-000001" / "checkpoint-000009.parquet"
        commit.add_checkpoint(self._engine, self._ownership, stretch, lambda _: other)

    monkeypatch.setattr(commit.Committer, "commit", twice)
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 4
    assert "checkpoint-000001.parquet has positions of 0 to 15 already" in answer.error
