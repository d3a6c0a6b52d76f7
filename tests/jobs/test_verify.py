"""verify.py: if this fails, vectors that are not the model's pass as good, or good ones do not."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.processes import peak_bytes
from lib.files import file_sha256
from lib.jobs import references, verification
from lib.jobs.fair_esm import needed_bytes
from lib.models import regression
from lib.models.adapted import AdaptedWeights
from lib.models.detection import detect
from lib.models.fair_esm_file import FairEsmFile
from lib.models.huggingface import HuggingFaceFolder
from lib.models.regression import regression_path
from lib.models.untrained import make_folder, make_model
from lib.network import elementwise
from lib.settings import load_settings
from schema.parquet import FOOTER_KEY, VectorColumn
from schema.tables import Run
from tests.adapters import TENSORS, save_adapter
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.jobs.test_resume import QUICK, killed_at
from tests.models.test_saved_by_transformers import SAVED
from tests.processes import run_function
from tests.reference import fasta, write_fasta

# transformers takes seconds to import: one process does those tests that need it.
pytestmark = pytest.mark.xdist_group("transformers")

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
        "run 1: within the bounds of float32; 15 of 15 records computed again by fair-esm 2.0.0 "
        "in float32 (seed 3) (untrained weights)"
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
    answers = [
        script("verify", "--run", "1", "--sample", "4", "--seed", seed, "--json").json
        for seed in ("8", "8", "9")
    ]
    drawn = [answer["drawn"] for answer in answers]
    assert len(set(drawn[0])) == 4
    assert drawn[0] == drawn[1] != drawn[2]
    assert answers[0]["records"] == answers[1]["records"]


def test_the_longest_shortest_truncated_and_shared_records_are_always_compared(
    script: Script, place: Place, small_model: Path
) -> None:
    """A sample of one left out the records whose vectors come about in a way of their own."""
    entries = [(f"p{i}", f"MKTAYIAK{'GAVLIPFYWS'[i]}") for i in range(10)]
    entries[3:3] = [("short", "MK"), ("truncated", "MKTAY" * 20), ("twin", "MKTAYIAKG")]
    source = write_fasta(place.folder / "kinds.fasta", entries)
    embed(script, small_model, "--repr-layers", "0", "-1", source=source)
    flags = ["--run", "1", "--sample", "1", "--seed", "5"]
    answer = script("verify", *flags, "--json")
    assert answer.status == 0, answer.err
    found = answer.json
    assert found["always"] == {"longest": [4], "shortest": [3], "truncated": [4], "shared": [0, 5]}
    assert len(found["drawn"]) == 1
    assert found["records"] == sorted({*found["drawn"], 0, 3, 4, 5})
    names = [f"{kind}_{layer}" for kind in ("mean", "bos", "per_tok") for layer in (0, 2)]
    assert [column["column"] for column in found["columns"]] == [*names, "contacts"]
    assert {column["compared"] for column in found["columns"] if "mean" in column["column"]} == {
        len(found["records"])
    }
    for record in (0, 3, 4, 5):
        before = (place.output / "run-000001" / "checkpoint-000001.parquet").read_bytes()

        def change(rows: dict[int, Any], record: int = record) -> None:
            rows[record]["mean_2"][0] += 0.05

        tamper(place, change)
        answer = script("verify", *flags)
        assert answer.status == 1, (record, answer.out)
        tamper_back(place, before)


def tamper_back(place: Place, content: bytes) -> None:
    """Put the file of run 1 back as it was."""
    path = place.output / "run-000001" / "checkpoint-000001.parquet"
    path.write_bytes(content)
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute(
            "UPDATE checkpoints SET bytes = ?, sha256 = ?", (len(content), file_sha256(path))
        )


# ---- The reference


# What each format is compared with, whatever this program's reader makes of it.
MODELS = {
    "fair-esm file": "fair-esm 2.0.0",
    "fair-esm file of any name": "fair-esm 2.0.0",
    "Hugging Face folder": "transformers 5.23.0",
    "adapter of transformers' model": "PEFT 0.21.2 on transformers 5.23.0",
    "adapter of the masked model": "PEFT 0.21.2 on transformers 5.23.0",
    "adapter of the classifier": "PEFT 0.21.2 on transformers 5.23.0",
    "adapter of fair-esm's model": "PEFT 0.21.2 on fair-esm 2.0.0",
    "adapter of transformers' model on a fair-esm file": (
        "PEFT 0.21.2 on transformers 5.23.0, the base loaded by fair-esm 2.0.0"
    ),
}


def model_of(what: str, folder: Path, small_model: Path) -> tuple[Path, list[str]]:
    """Return a model and flags for it; all are untrained."""
    adapters = SAVED / "adapters"
    if what == "fair-esm file":
        return small_model, []
    if what == "fair-esm file of any name":
        make_model(folder / "tuned.v2.pt", 2, 64, 4, dtype=torch.bfloat16)
        return folder / "tuned.v2.pt", []
    if what == "Hugging Face folder":
        return SAVED / "4.57.6" / "EsmModel-single", []
    if what == "adapter of fair-esm's model":
        base = adapters / "base_fair_esm.pt"
        return adapters / "fair_esm_plain", ["--set", f"model.base_model={base}"]
    if what == "adapter of transformers' model on a fair-esm file":
        return save_adapter(folder / "lora", small_model, TENSORS), []
    names = {"transformers": "plain", "masked": "saves_the_lm_head", "classifier": "saves_the_cl"}
    (name,) = [name for part, name in names.items() if part in what]
    (saved,) = adapters.glob(f"{name}*") if name != "plain" else [adapters / name]
    return saved, ["--set", f"model.base_model={SAVED / '4.57.6' / 'EsmModel-single'}"]


@pytest.fixture(params=MODELS)
def compared(
    request: pytest.FixtureRequest, tmp_path: Path, small_model: Path
) -> tuple[str, Path, list[str]]:
    """A model of each format: what it is compared with, its path, flags for it."""
    return MODELS[request.param], *model_of(request.param, tmp_path, small_model)


KEPT = ["--include", "mean", "bos", "per_tok", "--repr-layers", "0", "1", "2"]


def test_the_reference_is_the_library_of_the_format(
    script: Script, compared: tuple[str, Path, list[str]]
) -> None:
    reference, model, flags = compared
    embedded = script(
        "embed", "--esm-model", model, "--input", SOME_PROTEINS, *KEPT, *SHORT, *flags
    )
    assert embedded.status == 0, embedded.err
    answer = script("verify", *ALL)
    assert answer.status == 0, answer.out + answer.err
    assert f"15 of 15 records computed again by {reference} in float32" in answer.out
    assert f"go through {reference} (seed" in answer.err
    found = script("verify", *ALL, "--json").json
    assert (found["reference"], found["own_reader"]) == (reference, None)


def swapping(read: Any) -> Any:  # noqa: ANN401
    """A reader that takes the keys of the second layer for its queries, and the other way round."""
    swap = {"layers.1.self_attn.q_proj.weight": "layers.1.self_attn.k_proj.weight"}
    swap |= {other: one for one, other in swap.items()}

    def broken(self: Any, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
        for name in names:
            ((_, tensor),) = read(self, [swap.get(name, name)])
            yield name, tensor.flip(0) if name == "layers.0.fc1.bias" else tensor

    return broken


@pytest.mark.parametrize("mistake", ["tensors", "layer_norm_eps"])
def test_a_mistake_of_the_reader_is_found(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    compared: tuple[str, Path, list[str]],
    mistake: str,
) -> None:
    """fair-esm's module got its tensors from that reader, and agreed with the swapped ones."""
    _reference, model, flags = compared
    if mistake == "tensors":
        for reader in (FairEsmFile, HuggingFaceFolder):
            monkeypatch.setattr(reader, "read", swapping(reader.read))
    else:
        monkeypatch.setattr(elementwise, "_NORM_EPS", 1e-2)
    embedded = script(
        "embed", "--esm-model", model, "--input", SOME_PROTEINS, *KEPT, *SHORT, *flags
    )
    assert embedded.status == 0, embedded.err
    answer = script("verify", *ALL)
    assert answer.status == 1, answer.out + answer.err
    assert "mean_2" in answer.out.splitlines()[-1]
    assert "outside the bounds of float32" in answer.out


def test_a_mistake_in_laying_an_adapter_over_its_base_is_found(
    script: Script, tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptedWeights, "read", lambda self, names: self.base.read(names))
    model, flags = model_of("adapter of transformers' model", tmp_path, small_model)
    embedded = script(
        "embed", "--esm-model", model, "--input", SOME_PROTEINS, *KEPT, *SHORT, *flags
    )
    assert embedded.status == 0, embedded.err
    answer = script("verify", *ALL)
    assert answer.status == 1, answer.out + answer.err


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_contacts_are_those_that_the_library_predicts(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A regression that the reader turned round is found."""
    model = small_model
    if kind == "folder":
        model = place.folder / "folder"
        make_folder(model, 2, 64, 4)
    checked = regression._checked

    def turned(*args: Any) -> Any:  # noqa: ANN401
        right = checked(*args)
        return dataclasses.replace(right, weight=right.weight.flip(0))

    monkeypatch.setattr(regression, "_checked", turned)
    embed(script, model)
    answer = script("verify", *ALL)
    assert answer.status == 1
    assert "run 1: contacts outside the bounds of float32" in answer.out


@pytest.mark.parametrize(
    ("what", "missing"),
    [("Hugging Face folder", "transformers"), ("adapter of fair-esm's model", "peft")],
)
def test_without_the_library_the_output_says_who_read_the_weights(
    script: Script,
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    missing: str,
) -> None:
    model, flags = model_of(what, tmp_path, small_model)
    embedded = script(
        "embed", "--esm-model", model, "--input", SOME_PROTEINS, *KEPT, *SHORT, *flags
    )
    assert embedded.status == 0, embedded.err
    monkeypatch.setitem(sys.modules, missing, None)
    reason = f"{missing} is not installed"
    answer = script("verify", *ALL)
    assert answer.status == 0, answer.out + answer.err
    assert f"fair-esm 2.0.0 with tensors read by esm-ledger ({reason}) in float32" in answer.out
    found = script("verify", *ALL, "--json").json
    assert (found["reference"], found["own_reader"]) == ("fair-esm 2.0.0", reason)


def test_what_fair_esm_does_not_load_is_named(
    script: Script, place: Place, small_model: Path
) -> None:
    """A trunk without a language-model head, as some fine-tunes are saved."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        archive = torch.load(small_model, weights_only=True)
    archive["model"] = {k: v for k, v in archive["model"].items() if "lm_head" not in k}
    torch.save(archive, place.folder / "trunk.pt")
    flags = ["--esm-model", place.folder / "trunk.pt", "--input", SOME_PROTEINS, *SHORT]
    assert script("embed", *flags).status == 0
    answer = script("verify", *ALL)
    assert answer.status == 0, answer.err
    assert "with tensors read by esm-ledger (not loaded by its own library: RuntimeError: " in (
        answer.out
    )
    assert "Missing key(s) in state_dict" in answer.out


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
    # And their vectors, of both layers and the embedding.
    needed = 60 * 4 * 52**2 + 4 * 52 * 64 * 3
    monkeypatch.setattr(verification, "available_bytes", lambda *_: needed - 1)
    answer = script("verify", *ALL)
    assert answer.status == 0
    assert (
        "left out: record 0 (long): 50 residues need 688.9 kB of memory in fair-esm 2.0.0, "
        "688.9 kB are available" in answer.err
    )
    assert "1 of 2 records computed again" in answer.out
    monkeypatch.setattr(verification, "available_bytes", lambda *_: 1)
    answer = script("verify", *ALL)
    assert answer.status == 4
    assert "no drawn record fits into memory" in answer.error
    monkeypatch.setattr(references, "available_bytes", lambda *_: 1)
    answer = script("verify", *ALL)
    assert answer.status == 4
    assert " parameters in float32 need 408.8 kB of memory, 1 B are available" in answer.error


def print_peaks(path: Path) -> None:
    """Print a sequence's peaks in the reference beyond that of a tiny one, and the estimates.

    First of vectors alone, then with contacts, which take more.
    """
    settings = load_settings(overrides={"model.esm_model": str(path)})
    detection = detect(settings.model, contacts=True)
    model = references.choose_reference(detection).model

    def peak(residues: int, *, contacts: bool) -> int:
        model.compute("M" * residues, [2], contacts=contacts)
        return peak_bytes()

    before = peak(10, contacts=False)
    for contacts in (False, True):
        needed = needed_bytes(detection.shape, 1022, contacts=contacts)
        print(peak(1022, contacts=contacts) - before, needed)


@pytest.mark.parametrize("library", ["fair-esm", "transformers"])
def test_a_reference_takes_no_more_than_estimated(
    tmp_path: Path, small_model: Path, library: str
) -> None:
    model = small_model
    if library == "transformers":
        model = tmp_path / "folder"
        make_folder(model, 2, 64, 4)
    done = run_function(partial(print_peaks, model))
    assert done.status == 0, done.err
    for line in done.out.splitlines():
        taken, needed = map(int, line.split())
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
