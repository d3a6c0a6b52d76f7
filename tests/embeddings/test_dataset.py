"""Datasets: if this fails, what people publish on the Hub is not what the run computed.

The folder is read by the `datasets` library, in a process of its own and without a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from lib.embeddings import open_run
from tests.conftest import SOME_PROTEINS, Place, Script, run_program
from tests.reference import read_run, write_fasta

# As the card shows it, and then all of it in words.
READ = """
import json
from datasets import load_dataset
dataset = load_dataset({folder!r}, split="train")
rows = dataset.with_format("numpy")[:]
print(json.dumps([dataset.column_names, str(dataset.features[{column!r}]), rows["record"].tolist(),
    list(map(str, rows["id"])), [row.tobytes().hex() for row in rows[{column!r}]]]))
"""


def loaded(place: Place, folder: Path, column: str) -> Any:  # noqa: ANN401
    return json.loads(run_program(place.folder, READ.format(folder=str(folder), column=column)))


@pytest.fixture
def rows(script: Script, place: Place, small_model: Path) -> dict[int, dict[str, Any]]:
    place.set("output", "checkpoint_records", 4)
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
        "--include", "mean", "per_tok", "--set", "input.max_residues=200",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    return dict(sorted(read_run(place.output / "run-000001").items()))


def test_datasets_reads_every_vector_in_the_order_of_the_fasta(
    script: Script,
    place: Place,
    rows: dict[int, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Six rows to a file, two to a row group.
    monkeypatch.setattr("lib.embeddings.dataset._SHARD_BYTES", 6 * 256)
    monkeypatch.setattr("lib.embeddings.dataset._GROUP_BYTES", 2 * 256)
    to = place.folder / "proteins"
    answer = script("export", "--run", "1", "--format", "dataset", "--to", to)
    assert answer.status == 0, answer.err
    files = sorted(path.name for path in to.glob("*.parquet"))
    assert files == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert [pq.read_metadata(to / name).num_row_groups for name in files] == [3, 3, 2]
    assert {pq.read_schema(to / name).field("description").type for name in files} == {pa.string()}
    names, feature, numbers, ids, vectors = loaded(place, to, "mean_2")
    assert names == ["record", "id", "description", "length", "embedded_length", "mean_2"]
    assert "float32" in feature
    assert "64" in feature
    assert numbers == list(rows)
    assert ids == [row["id"] for row in rows.values()]
    assert vectors == [row["mean_2"].tobytes().hex() for row in rows.values()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_residues_are_a_matrix_for_each_record(
    script: Script, place: Place, small_model: Path, dtype: str
) -> None:
    answer = script(
        "embed", "--esm-model", small_model, "--input", SOME_PROTEINS, "--include", "per_tok",
        "--set", f"output.per_tok_dtype={dtype}",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    to = place.folder / "residues"
    answer = script("export", "--run", "1", "--format", "dataset", "--per-residue", "--to", to)
    assert answer.status == 0, answer.err
    (file,) = to.glob("*.parquet")
    run = open_run(place.database, 1)
    found = pq.read_table(file).column("per_tok_2").to_pylist()
    for record, residues in zip(run.records.tolist(), found, strict=True):
        assert np.array(residues, dtype).tobytes() == run.residues(record).tobytes()
    if dtype == "float32":
        _, _, _, _, matrices = loaded(place, to, "per_tok_2")
        assert matrices == [run.residues(record).tobytes().hex() for record in range(15)]


def test_the_card_says_what_the_vectors_are(
    script: Script, place: Place, rows: dict[int, dict[str, Any]]
) -> None:
    to = place.folder / "proteins"
    assert script("export", "--run", "1", "--format", "dataset", "--to", to).status == 0
    card = DatasetCard.load(to / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert card.data.configs == [
        {
            "config_name": "default",
            "data_files": [{"split": "train", "path": "train-*.parquet"}],
        }
    ]
    model = open_run(place.database, 1).model
    cut = sum(row["embedded_length"] < row["length"] for row in rows.values())
    assert 0 < cut < 15
    for fact in (
        "**Untrained weights: the vectors mean nothing.**",
        "| model | esm2_small |",
        f"| SHA-256 of its weights | {model['sha256']} |",
        "| is a released ESM-2 model | no |",
        "| layer | 2 of 2 (0 is the embedding) |",
        "| pooling | mean over the embedded residues, without `<cls>` and `<eos>` |",
        "| precision of matrix products | float32 |",
        f"| long sequences | more than 200 residues: the first 200 are embedded ({cut} records) |",
        "| records | 15 of 15 |",
        f"| input | {SOME_PROTEINS.name} |",
        "| `mean_2` | 64 numbers |",
    ):
        assert f"\n{fact}\n" in card.content, fact
    assert "torch 2." in card.content
    assert str(place.folder) not in card.content


def test_several_inputs_are_named_without_their_folders(
    script: Script, place: Place, small_model: Path
) -> None:
    files = [write_fasta(place.folder / f"{name}.fasta", [(name, "MKV")]) for name in "ab"]
    assert script("embed", "--esm-model", small_model, "--input", *files).status == 0
    to = place.folder / "both"
    assert script("export", "--run", "1", "--format", "dataset", "--to", to).status == 0
    card = DatasetCard.load(to / "README.md")
    assert card.data.pretty_name == "ESM-2 embeddings of a.fasta and 1 more"
    assert "\n| input | a.fasta, b.fasta |\n" in card.content
    (file,) = to.glob("*.parquet")
    assert str(place.folder).encode() not in file.read_bytes()
    assert pq.read_table(file)["input_file"].to_pylist() == ["a.fasta", "b.fasta"]


def test_a_name_cannot_break_the_card(script: Script, place: Place, small_model: Path) -> None:
    odd = place.folder / "a|b: [c].fasta"
    odd.write_text(">one\nMKV\n")
    assert script("embed", "--esm-model", small_model, "--input", odd).status == 0
    to = place.folder / "odd"
    assert script("export", "--run", "1", "--format", "dataset", "--to", to).status == 0
    card = DatasetCard.load(to / "README.md")
    assert card.data.pretty_name == f"ESM-2 embeddings of {odd.name}"
    assert "\n| input | a&#124;b: [c].fasta |\n" in card.content
