"""verify.py: if this fails, vectors that are not the model's pass as good, or good ones do not."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.processes import peak_bytes
from lib.files import file_sha256
from lib.jobs import fair_esm, verification
from lib.models.detection import detect
from lib.models.regression import regression_path
from lib.models.untrained import make_folder
from lib.settings import load_settings
from schema.parquet import FOOTER_KEY, VectorColumn
from schema.tables import Run
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.jobs.test_resume import QUICK, killed_at
from tests.models.test_adapter import TENSORS, save_adapter
from tests.processes import run_function
from tests.reference import fasta, write_fasta

KINDS = ["--include", "mean", "bos", "per_tok", "contacts"]
SHORT = ["--set", "input.max_residues=60"]
ALL = ["--run", "1", "--sample", "100"]


def embed(script: Script, model: Path, *flags: str, source: Path = SOME_PROTEINS) -> None:
    answer = script("embed", "--esm-model", model, "--input", source, *KINDS, *SHORT, *flags)
    assert answer.status == 0, answer.err


def tamper(place: Place, change: Callable[[dict[int, Any]], None]) -> None:
    """Change run 1's rows, record by record, so that file, footer and database still agree."""
    (path,) = (place.output / "run-000001").glob("*.parquet")
    table = pq.read_table(path)
    footer = pq.read_metadata(path).metadata[FOOTER_KEY]
    rows = {row["record"]: row for row in table.to_pylist()}
    change(rows)
    schema = table.schema.with_metadata({FOOTER_KEY: footer})
    pq.write_table(pa.Table.from_pylist([*rows.values()], schema), path)
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute(
            "UPDATE checkpoints SET bytes = ?, sha256 = ?",
            (path.stat().st_size, file_sha256(path)),
        )


def test_a_good_run_is_within_the_bounds_in_every_column(
    script: Script, place: Place, small_model: Path
) -> None:
    embed(script, small_model, "--repr-layers", "0", "1", "-1")
    answer = script("verify", *ALL, "--seed", "3")
    assert answer.status == 0, answer.out + answer.err
    *table, verdict = answer.out.splitlines()
    assert [line.split()[0] for line in table[1:]] == [
        *(f"{kind}_{layer}" for kind in ("mean", "bos", "per_tok") for layer in (0, 1, 2)),
        "contacts",
    ]
    assert all(" good " in line for line in table[1:])
    assert verdict == (
        "run 1: within the bounds of float32; 15 of 15 records computed again by fair-esm in "
        "float32 (seed 3) (untrained weights)"
    )
    columns = {one["column"]: one for one in script("verify", *ALL, "--json").json["columns"]}
    lengths = [min(len(sequence), 60) for _, sequence in fasta(SOME_PROTEINS)]
    assert columns["mean_2"]["compared"] == columns["bos_2"]["compared"] == 15
    assert columns["per_tok_2"]["compared"] == sum(lengths)
    assert columns["contacts"]["compared"] == sum(length**2 for length in lengths)
    for name in ("mean_2", "bos_2", "per_tok_2", "contacts"):
        one = columns[name]
        assert one["median_error"] <= one["worst_error"] <= one["error_bound"] == 1e-5
        assert one["worst_error"] > 0
    assert columns["mean_2"]["worst_cosine"] >= 0.9999999


@pytest.mark.parametrize(
    ("precision", "dtype", "bound", "rounding"),
    [
        ("float32", "float16", 1e-5, 5e-4),
        ("bfloat16", "float32", 2e-2, 0),
        ("float16", "float16", 3e-3, 5e-4),
    ],
)
def test_half_precision_has_its_own_bounds(
    script: Script, small_model: Path, precision: str, dtype: str, bound: float, rounding: float
) -> None:
    flags = [f"compute.precision={precision}", f"output.per_tok_dtype={dtype}"]
    embed(script, small_model, *(word for flag in flags for word in ("--set", flag)))
    answer = script("verify", *ALL, "--json")
    assert answer.status == 0, answer.out + answer.err
    columns = {one["column"]: one for one in answer.json["columns"]}
    assert columns["mean_2"]["error_bound"] == columns["contacts"]["error_bound"] == bound
    assert columns["per_tok_2"]["error_bound"] == bound + rounding
    assert columns["mean_2"]["cosine_bound"] == (None if precision == "float32" else 0.9999)
    # Really in half precision: float32 is never that far off.
    assert columns["per_tok_2"]["worst_error"] > 1e-5


@pytest.mark.parametrize("column", ["mean_2", "bos_2", "per_tok_2", "contacts"])
def test_a_value_changed_behind_every_digest_is_caught(
    script: Script, place: Place, small_model: Path, column: str
) -> None:
    embed(script, small_model)

    def change(rows: dict[int, Any]) -> None:
        rows[3][column][0] += 0.05

    tamper(place, change)
    assert script("validate", "--run", "1").status == 0
    answer = script("verify", *ALL)
    assert answer.status == 1, answer.out
    assert f"run 1: {column} outside the bounds of float32" in answer.out
    (line,) = [line for line in answer.out.splitlines() if "OUTSIDE" in line]
    identifier = fasta(SOME_PROTEINS)[3][0].split()[0]
    assert line.startswith(column)
    assert line.endswith(f"3 ({identifier})")


def test_vectors_that_stand_beside_the_wrong_record_are_caught(
    script: Script, place: Place, small_model: Path
) -> None:
    embed(script, small_model, "--set", "compute.precision=bfloat16")

    def swap(rows: dict[int, Any]) -> None:
        rows[0]["mean_2"], rows[1]["mean_2"] = rows[1]["mean_2"], rows[0]["mean_2"]

    tamper(place, swap)
    answer = script("verify", *ALL)
    assert answer.status == 1
    assert "run 1: mean_2 outside the bounds of bfloat16" in answer.out


def test_what_is_no_number_is_outside(script: Script, place: Place, small_model: Path) -> None:
    embed(script, small_model)

    def change(rows: dict[int, Any]) -> None:
        rows[5]["bos_2"][7] = float("nan")

    tamper(place, change)
    answer = script("verify", *ALL)
    assert answer.status == 1
    assert "run 1: bos_2 outside the bounds" in answer.out
    assert f"5 ({fasta(SOME_PROTEINS)[5][0].split()[0]})" in answer.out
    (column,) = [one for one in script("verify", *ALL, "--json").json["columns"] if not one["good"]]
    assert (column["column"], column["worst_error"], column["worst_record"]) == ("bos_2", None, 5)


def test_other_weights_another_regression_another_input_are_refused_first(
    script: Script, place: Place, small_model: Path, other_model: Path
) -> None:
    embed(script, small_model)
    answer = script("verify", *ALL, "--esm-model", other_model)
    assert answer.status == 3
    assert "sha256 of the weights is" in answer.error
    mixed = place.folder / "mixed.pt"
    shutil.copy(small_model, mixed)
    shutil.copy(regression_path(other_model), regression_path(mixed))
    answer = script("verify", *ALL, "--esm-model", mixed)
    assert answer.status == 3
    assert "sha256 of the contact regression is" in answer.error
    other = write_fasta(place.folder / "other.fasta", fasta(SOME_PROTEINS)[1:])
    answer = script("verify", *ALL, "--input", other)
    assert answer.status == 3
    assert "sha256 of the input is" in answer.error
    (path,) = (place.output / "run-000001").glob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    answer = script("verify", *ALL)
    assert answer.status == 3
    assert "its bytes do not match their digest" in answer.error


def test_hugging_face_folders_and_adapters_are_verified_too(
    script: Script, place: Place, small_model: Path
) -> None:
    folder = place.folder / "folder"
    make_folder(folder, 2, 64, 4, token_dropout=False)
    adapter = save_adapter(place.folder / "lora", small_model, TENSORS)
    for run, model in (("1", folder), ("2", adapter)):
        embed(script, model)
        answer = script("verify", "--run", run)
        assert answer.status == 0, answer.out + answer.err
        assert "outside" not in answer.out.lower()


def test_sequences_are_compared_as_they_were_embedded(
    script: Script, place: Place, small_model: Path
) -> None:
    entries = [
        ("lower", "mktayiakqrqisfvk*"),
        ("odd", "MKJ?TAYIAKQR"),
        ("same", "MKTAYIAKQRQISFVK"),
    ]
    source = write_fasta(place.folder / "odd.fasta", entries)
    embed(script, small_model, "--set", "input.unknown_residues=x", source=source)
    answer = script("verify", *ALL)
    assert answer.status == 0, answer.out + answer.err
    assert "3 of 3 records" in answer.out


def test_a_seed_draws_the_same_records_again(
    script: Script, place: Place, small_model: Path
) -> None:
    embed(script, small_model)
    drawn = [
        script("verify", "--run", "1", "--sample", "4", "--seed", seed, "--json").json["records"]
        for seed in ("8", "8", "9")
    ]
    assert len(set(drawn[0])) == 4
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_unfinished_run_is_verified_as_far_as_it_is(
    script: Script, place: Place, small_model: Path
) -> None:
    flags: list[str | Path] = ["--esm-model", small_model, "--input", SOME_PROTEINS, *QUICK]
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 1), "embed", *flags)
    answer = script("verify", *ALL)
    assert answer.status == 0, answer.out + answer.err
    assert "of 15 records" in answer.out
    assert "15 of 15" not in answer.out
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "before", 1), "embed", *flags)
    answer = script("verify", "--run", "2")
    assert answer.status == 2
    assert answer.error == "run 2: no record is done"
    assert script("verify", "--run", "3").error.startswith("run 3: not in database")
    assert script("verify", "--run", "1", "--sample", "0").error == (
        "sample 0: less than one record"
    )


def test_what_does_not_fit_into_memory_is_left_out_and_named(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta(place.folder / "two.fasta", [("long", "MK" * 25), ("short", "MKV")])
    embed(script, small_model, source=source)
    # Maps of 52 tokens: three of each of the four heads, and six of each of both layers' heads.
    monkeypatch.setattr(verification, "available_bytes", lambda _: 60 * 4 * 52**2 - 1)
    answer = script("verify", *ALL)
    assert answer.status == 0
    assert "left out: record 0 (long): 50 residues need 0.0 GB of memory in fair-esm" in answer.err
    assert "1 of 2 records computed again" in answer.out
    monkeypatch.setattr(verification, "available_bytes", lambda _: 1)
    answer = script("verify", *ALL)
    assert answer.status == 4
    assert "no drawn record fits into memory" in answer.error
    monkeypatch.setattr(fair_esm, "available_bytes", lambda _: 1)
    answer = script("verify", *ALL)
    assert answer.status == 4
    assert "parameters in float32 need 0.0 GB of memory" in answer.error


def print_peak(path: Path, kind: str) -> None:
    """Print a sequence's peak in fair-esm beyond that of a tiny one, and the estimate."""
    settings = load_settings(overrides={"model.esm_model": str(path)})
    model = fair_esm.FairEsm(detect(settings.model, contacts=kind == "contacts"))

    def peak(residues: int) -> int:
        model.compute("M" * residues, [2])
        return peak_bytes()

    before = peak(10)
    print(peak(1022) - before, model.needed_bytes(1022))


@pytest.mark.parametrize("kind", ["contacts", "mean"])
def test_fair_esm_takes_no_more_than_estimated(small_model: Path, kind: str) -> None:
    done = run_function(partial(print_peak, small_model, kind))
    assert done.status == 0, done.err
    taken, needed = map(int, done.out.split())
    assert taken <= needed


def test_the_worst_of_several_records_is_named() -> None:
    """The record with the largest error, not the largest mean of errors."""
    compared = [
        verification._Compared(1, "even", np.array([3.0, 3.0]), np.empty(0)),
        verification._Compared(2, "odd", np.array([0.0, 4.0]), np.empty(0)),
    ]
    run = Run(precision="float32", per_tok_dtype="float32")
    found = verification._agreement(run, VectorColumn("contacts"), compared)
    assert (found.worst_record, found.worst_error, found.median_error) == (2, 4.0, 3.0)
    assert not found.good
