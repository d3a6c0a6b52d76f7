"""Exports: if this fails, the programs that people have read wrong vectors, or half a file.

Every format is read back by the library that its users use, and compared with the Parquet.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import esm
import h5py
import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow.parquet as pq
import pytest
import torch

from lib.errors import SettingsError
from lib.files import new_path
from lib.ledger.database import open_for_writing, transaction
from lib.ledger.history import query
from schema.version import VERSION
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Once, Place, Script
from tests.reference import fasta, read_run, write_fasta
from tests.test_make import make

Row = dict[str, Any]
VALUES = [f"mean_0_{i}" for i in range(64)]


def read_anndata(path: Path) -> Any:  # noqa: ANN401
    with warnings.catch_warnings():
        # anndata and what it imports announce their own deprecations; with zarr it takes a second.
        warnings.simplefilter("ignore")
        import anndata
    return anndata.read_h5ad(path)


@pytest.fixture
def rows(script: Script, place: Place, small_model: Path, once: Once) -> dict[int, Row]:
    """A run with everything kept at two layers, as pyarrow reads it, by record."""

    def embed() -> None:
        place.set("output", "checkpoint_records", 4)
        answer = script(
            "embed", "--esm-model", small_model, "--input", SOME_PROTEINS,
            "--include", "mean", "bos", "per_tok", "--repr-layers", "0", "-1",
        )  # fmt: skip
        assert answer.status == 0, answer.err

    once(embed)
    return dict(sorted(read_run(place.output / "run-000001").items()))


def test_hdf5_is_read_as_uniprots_help_reads_it(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    to = place.folder / "proteins.h5"
    answer = script("export", "--run", "1", "--format", "hdf5", "--to", to)
    assert answer.status == 0, answer.err
    assert "15 of 15 records" in answer.out
    assert "(untrained weights)" in answer.out
    with h5py.File(to, "r") as file:
        assert file.attrs["model"] == "esm2_small"
        assert len(file.attrs["model_sha256"]) == 64
        assert bool(file.attrs["untrained"])
        assert (file.attrs["layer"], file.attrs["pooling"]) == (2, "mean")
        assert json.loads(file.attrs["esm_ledger"])["records"] == 15
        found = [(key, np.array(embedding)) for key, embedding in file.items()]
        assert [file[key].attrs["original_id"] for key, _ in found] == [
            row["id"] for row in rows.values()
        ]
    for (key, vector), row in zip(found, rows.values(), strict=True):
        assert key == row["id"].replace("/", "_")
        assert vector.dtype == np.float32
        assert vector.tobytes() == row["mean_2"].tobytes()


def test_hdf5_per_residue_and_in_half_precision(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    whole, half = place.folder / "residues.h5", place.folder / "half.h5"
    base = ["export", "--run", "1", "--format", "hdf5", "--per-residue", "--layer", "0"]
    assert script(*base, "--to", whole).status == 0
    assert script(*base, "--dtype", "float16", "--to", half).status == 0
    with h5py.File(whole, "r") as exact, h5py.File(half, "r") as rounded:
        assert exact.attrs["pooling"] == "none"
        for row in rows.values():
            expected = row["per_tok_0"].reshape(row["embedded_length"], 64)
            assert exact[row["id"]][:].tobytes() == expected.tobytes()
            found = rounded[row["id"]][:]
            assert found.dtype == np.float16
            assert found.tobytes() == expected.astype(np.float16).tobytes()


def test_esm_extract_has_the_keys_and_tensors_of_extract_py(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    to = place.folder / "extracted"
    answer = script("export", "--run", "1", "--format", "esm-extract", "--to", to)
    assert answer.status == 0, answer.err
    # fair-esm's own reader says what the labels are.
    labels = esm.FastaBatchedDataset.from_file(SOME_PROTEINS).sequence_labels
    names = [label.replace("/", "_") + ".pt" for label in labels]
    assert sorted(path.name for path in to.iterdir()) == sorted([*names, "run.json"])
    assert json.loads((to / "run.json").read_text())["untrained"] is True
    for label, name, row in zip(labels, names, rows.values(), strict=True):
        result = torch.load(to / name, weights_only=True)
        assert list(result) == [
            "label", "representations", "mean_representations", "bos_representations",
        ]  # fmt: skip
        assert result["label"] == label
        for key, kind in (("mean_representations", "mean"), ("bos_representations", "bos")):
            assert list(result[key]) == [0, 2]
            for layer, tensor in result[key].items():
                assert tensor.shape == (64,)
                assert tensor.numpy().tobytes() == row[f"{kind}_{layer}"].tobytes()
        for layer, tensor in result["representations"].items():
            assert tensor.shape == (row["embedded_length"], 64)
            assert tensor.dtype == torch.float32
            assert tensor.numpy().tobytes() == row[f"per_tok_{layer}"].tobytes()


def test_esm_extract_has_contacts_as_extract_py_writes_them(
    script: Script, place: Place, small_model: Path
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    assert script("embed", *flags, "--include", "contacts", "bos").status == 0
    to = place.folder / "extracted"
    answer = script("export", "--run", "1", "--format", "esm-extract", "--to", to)
    assert answer.status == 0, answer.err
    rows: dict[int, Row] = dict(read_run(place.output / "run-000001"))
    for record, (header, _) in enumerate(fasta(SOME_PROTEINS)):
        row = rows[record]
        result = torch.load(to / f"{header.replace('/', '_')}.pt", weights_only=True)
        assert list(result) == ["label", "bos_representations", "contacts"]
        size = row["embedded_length"]
        assert result["contacts"].shape == (size, size)
        assert result["contacts"].dtype == torch.float32
        assert result["contacts"].numpy().tobytes() == row["contacts"].tobytes()


def test_npy_is_a_matrix_and_its_ids(script: Script, place: Place, rows: dict[int, Row]) -> None:
    to = place.folder / "matrix"
    answer = script("export", "--run", "1", "--format", "npy", "--bos", "--layer", "0", "--to", to)
    assert answer.status == 0, answer.err
    matrix = np.load(to / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    ids = (to / "ids.txt").read_text().splitlines()
    assert ids == [row["id"] for row in rows.values()]
    assert matrix.tobytes() == np.stack([row["bos_0"] for row in rows.values()]).tobytes()
    described = json.loads((to / "run.json").read_text())
    assert (described["layer"], described["pooling"], described["untrained"]) == (0, "bos", True)


def test_virnucpro_merges_it_as_its_own(script: Script, place: Place, rows: dict[int, Row]) -> None:
    to = place.folder / "proteins.pt"
    answer = script("export", "--run", "1", "--format", "virnucpro", "--to", to)
    assert answer.status == 0, answer.err
    loaded = torch.load(to, weights_only=True)
    assert list(loaded) == ["proteins", "data"]
    # What its merge_data does with it: a dictionary by id, and one torch.cat each.
    by_id = dict(zip(loaded["proteins"], loaded["data"], strict=True))
    for row in rows.values():
        merged = torch.cat((torch.zeros(3), by_id[row["id"]]), dim=-1)
        assert merged[3:].numpy().tobytes() == row["mean_2"].tobytes()
    assert loaded["proteins"] == [row["id"] for row in rows.values()]
    assert json.loads((place.folder / "proteins.pt.json").read_text())["untrained"] is True


def test_anndata_reads_matrix_records_and_run(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    to = place.folder / "proteins.h5ad"
    answer = script("export", "--run", "1", "--format", "anndata", "--to", to)
    assert answer.status == 0, answer.err
    read = read_anndata(to)
    assert list(read.obs_names) == [row["id"] for row in rows.values()]
    assert read.obs["length"].tolist() == [row["length"] for row in rows.values()]
    assert read.obs["record"].tolist() == list(rows)
    expected = np.stack([row["mean_2"] for row in rows.values()])
    assert np.asarray(read.X).tobytes() == expected.tobytes()
    assert bool(read.uns["esm_ledger"]["untrained"])
    assert read.uns["esm_ledger"]["layer"] == 2
    with h5py.File(to) as file:  # anndata before 0.12 reads no null
        kinds = [file[name].attrs.get("encoding-type") for name in file]
    assert "null" not in kinds


def test_csv_gives_the_same_bits_to_pandas(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    to = place.folder / "proteins.csv"
    answer = script("export", "--run", "1", "--format", "csv", "--layer", "0", "--to", to)
    assert answer.status == 0, answer.err
    assert answer.out == f"run 1: 15 of 15 records, mean_0, in {to} (csv) (untrained weights)\n"
    frame = pandas.read_csv(
        to, dtype=dict.fromkeys(VALUES, np.float32), float_precision="round_trip"
    )
    assert list(frame.columns) == ["record", "id", "length", "embedded_length", *VALUES]
    for name in ("id", "length", "embedded_length"):
        assert frame[name].tolist() == [row[name] for row in rows.values()]
    assert frame["record"].tolist() == list(rows)
    expected = np.stack([row["mean_0"] for row in rows.values()])
    assert frame[VALUES].to_numpy(np.float32).tobytes() == expected.tobytes()


def test_csv_keeps_every_id(script: Script, place: Place, small_model: Path) -> None:
    names = ["NA", "1e5", 'a"b', "a,b", "=1+1", "ü|1"]
    source = write_fasta(place.folder / "odd.fasta", [(name, "MKV") for name in names])
    assert script("embed", "--esm-model", small_model, "--input", source).status == 0
    to = place.folder / "odd.csv"
    assert script("export", "--run", "1", "--format", "csv", "--to", to).status == 0
    with to.open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == names


def read_npy_facts(to: Path) -> Any:  # noqa: ANN401
    assert np.load(to / "embeddings.npy").shape[1] == 64
    return json.loads((to / "run.json").read_text())


def read_hdf5_facts(to: Path) -> Any:  # noqa: ANN401
    with h5py.File(to, "r") as file:
        return json.loads(file.attrs["esm_ledger"])


def read_anndata_facts(to: Path) -> Any:  # noqa: ANN401
    facts = read_anndata(to).uns["esm_ledger"]
    # AnnData gives lists back as arrays, and numbers as numpy's.
    return json.loads(json.dumps(facts, default=lambda value: value.tolist()))


def read_facts_beside(to: Path) -> Any:  # noqa: ANN401
    return json.loads(to.with_name(f"{to.name}.json").read_text())


def read_dataset_facts(to: Path) -> Any:  # noqa: ANN401
    (path,) = to.glob("*.parquet")
    facts = json.loads(pq.read_metadata(path).metadata[b"esm_ledger_export"])
    # What is published names the file, not where it lay.
    assert facts["input"] == SOME_PROTEINS.name
    return {**facts, "input": str(SOME_PROTEINS)}


FACTS = {
    "hdf5": read_hdf5_facts,
    "esm-extract": lambda to: json.loads((to / "run.json").read_text()),
    "npy": read_npy_facts,
    "virnucpro": read_facts_beside,
    "anndata": read_anndata_facts,
    "csv": read_facts_beside,
    "dataset": read_dataset_facts,
}


@pytest.mark.parametrize("form", FACTS)
def test_every_export_says_where_its_vectors_come_from(
    script: Script, place: Place, rows: dict[int, Row], form: str
) -> None:
    to = place.folder / "out"
    answer = script("export", "--run", "1", "--format", form, "--to", to, "--json")
    assert answer.status == 0, answer.err
    facts = FACTS[form](to)
    assert {**facts, "format": form, "to": str(to)} == answer.json
    everything = [f"{kind}_{layer}" for kind in ("mean", "bos", "per_tok") for layer in (0, 2)]
    columns = everything if form == "esm-extract" else ["mean_2"]
    assert facts["columns"] == columns
    assert all(column in rows[0] for column in columns)
    if form != "esm-extract":
        assert (facts["layer"], facts["pooling"]) == (2, "mean")
    (run,) = query(str(place.database), "SELECT * FROM runs").dictionaries()
    for name in ("uuid", "precision", "max_residues", "long_sequences", "records_truncated"):
        assert facts["run_uuid" if name == "uuid" else name] == run[name]
    assert facts["input_sha256"] == hashlib.sha256(SOME_PROTEINS.read_bytes()).hexdigest()
    assert facts["model_config"] == json.loads(run["esm2_config"])
    # A CUDA build from PyPI has no suffix there, which torch itself has.
    assert facts["computed_with"]["torch"] == version("torch")
    assert facts["written_by"] == f"esm-ledger {VERSION}"


def test_half_precision_never_becomes_infinite(
    script: Script, place: Place, small_model: Path
) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(small_model, weights_only=True)
    (name,) = [key for key in weights["model"] if key.endswith("emb_layer_norm_after.weight")]
    weights["model"][name] *= 1e7
    torch.save(weights, place.folder / "loud.pt")
    embed = script("embed", "--esm-model", place.folder / "loud.pt", "--input", SOME_PROTEINS)
    assert embed.status == 0, embed.err
    to = place.folder / "half.h5"
    flags = ["--run", "1", "--format", "hdf5", "--dtype", "float16", "--to", to]
    answer = script("export", *flags)
    assert answer.status == 2
    assert re.fullmatch(r"record 0: a value of \S+ exceeds float16", answer.error)
    assert not to.exists()


def test_ids_that_make_trouble_in_names(script: Script, place: Place, small_model: Path) -> None:
    entries = [("a/b one", "MKV"), ("../up", "MKA"), ("ü|1", "MKT")]
    source = write_fasta(place.folder / "odd.fasta", entries)
    assert script("embed", "--esm-model", small_model, "--input", source).status == 0
    h5, folder = place.folder / "odd.h5", place.folder / "odd"
    assert script("export", "--run", "1", "--format", "hdf5", "--to", h5).status == 0
    with h5py.File(h5, "r") as file:
        originals = {key: data.attrs["original_id"] for key, data in file.items()}
    assert originals == {"a_b": "a/b", ".._up": "../up", "ü|1": "ü|1"}
    assert script("export", "--run", "1", "--format", "esm-extract", "--to", folder).status == 0
    assert {path.name for path in folder.glob("*.pt")} == {"a_b one.pt", ".._up.pt", "ü|1.pt"}
    label = torch.load(folder / "a_b one.pt", weights_only=True)["label"]
    assert label == "a/b one"


@pytest.mark.parametrize("form", ["hdf5", "esm-extract"])
def test_two_records_never_share_a_name(
    script: Script, place: Place, small_model: Path, form: str
) -> None:
    source = write_fasta(place.folder / "odd.fasta", [("a/b", "MKV"), ("c", "M"), ("a_b", "MKA")])
    assert script("embed", "--esm-model", small_model, "--input", source).status == 0
    before = place.files()
    answer = script("export", "--run", "1", "--format", form, "--to", place.folder / "out")
    assert answer.status == 2
    assert answer.error.startswith("record 2: ")
    assert answer.error.endswith("is record 0's")
    assert place.files() == before


FORMS = ["hdf5", "esm-extract", "npy", "virnucpro", "anndata", "csv", "dataset"]


@pytest.mark.parametrize("form", ["csv", "npy"])
def test_the_temporary_file_of_another_export_is_left_alone(
    script: Script,
    place: Place,
    rows: dict[int, Row],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """Two processes have the same number, if each is in a container of its own."""
    there = [place.folder / f".out.{name}.tmp" for name in (os.getpid(), "0badcafe")]
    theirs = [one if form == "csv" else one / "file" for one in there]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("another's")
    export = ["export", "--run", "1", "--format", form, "--to", place.folder / "out"]
    with monkeypatch.context() as unlucky:
        unlucky.setattr("lib.files.secrets.token_hex", lambda _bytes: "0badcafe")
        assert script(*export).status == 4
    assert script(*export).status == 0
    assert [file.read_text() for file in theirs] == ["another's"] * 2


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_exists_is_replaced(
    script: Script, place: Place, rows: dict[int, Row], form: str
) -> None:
    to = place.folder / "mine"
    to.write_text("my work")
    answer = script("export", "--run", "1", "--format", form, "--to", to)
    assert (answer.status, answer.error) == (2, f"{to}: exists already")
    assert to.read_text() == "my work"
    for nameless in ("/", ""):
        answer = script("export", "--run", "1", "--format", form, "--to", nameless)
        assert (answer.status, answer.error) == (2, f"{Path(nameless)}: exists already")


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    to = tmp_path / "mine"
    with pytest.raises(SettingsError, match="exists already"), new_path(to, folder=False) as part:
        part.write_text("an export")
        to.write_text("my work")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my work"]


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_an_export_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool
) -> None:
    done: list[object] = []
    sync = os.fsync

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append((path, (tmp_path / "out").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    with new_path(tmp_path / "out", folder=is_folder) as part:
        (part / "one" if is_folder else part).write_text("content")
    written = [part / "one", part] if is_folder else [part]
    assert done == [*((path, False) for path in written), (tmp_path, True)]


def test_after_a_kill_between_two_names_an_export_can_be_repeated(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    to = place.folder / "out.csv"
    export = ["export", "--run", "1", "--format", "csv", "--to", to]
    assert script(*export).status == 0
    whole = to.read_bytes()
    to.unlink()
    assert script(*export).status == 0
    assert to.read_bytes() == whole
    to.unlink()
    facts = to.with_name("out.csv.json")
    facts.write_text("{}")
    assert script(*export).error == f"{facts}: exists already"


def test_an_unfinished_run_only_with_partial(
    script: Script, place: Place, rows: dict[int, Row]
) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        change = session.connection().exec_driver_sql
        change("UPDATE runs SET status = 'interrupted'")
        change("DELETE FROM checkpoints WHERE first_position = 0")
    to = place.folder / "part"
    base = ["export", "--run", "1", "--format", "npy", "--to", to]
    refused = script(*base)
    assert refused.status == 2
    assert refused.error.startswith("run 1: interrupted, ")
    assert not to.exists()
    answer = script(*base, "--partial", "--json")
    assert answer.status == 0, answer.err
    assert answer.json["records"] == len((to / "ids.txt").read_text().splitlines()) < 15
    assert answer.json["status"] == "interrupted"


@pytest.mark.parametrize("form", FORMS)
def test_a_run_without_a_checkpoint_gives_a_whole_file(
    script: Script, place: Place, rows: dict[int, Row], form: str
) -> None:
    with open_for_writing(str(place.database)) as engine, transaction(engine) as session:
        change = session.connection().exec_driver_sql
        change("UPDATE runs SET status = 'interrupted'")
        change("DELETE FROM checkpoints")
    to = place.folder / "none"
    answer = script("export", "--run", "1", "--format", form, "--to", to, "--partial")
    assert answer.status == 0, answer.err
    assert "0 of 15 records" in answer.out
    assert FACTS[form](to)["records"] == 0


# bytes: less than any file of the format, or more than the vectors and less than the format.
@pytest.mark.parametrize(
    ("form", "limit"),
    [
        ("npy", 9000), ("esm-extract", 9000), ("hdf5", 9000), ("hdf5", 40_000),
        ("virnucpro", 40_000), ("anndata", 40_000), ("csv", 9000), ("csv", 40_000),
        ("dataset", 9000), ("dataset", 20_000),
    ],
)  # fmt: skip
def test_a_full_disk_leaves_nothing(
    place: Place, script: Script, small_model: Path, form: str, limit: int
) -> None:
    """The file-size limit refuses writes as a full disk does, with another errno."""
    entries = [(f"p{i}", sequence) for i, (_, sequence) in enumerate(fasta(SOME_PROTEINS) * 8)]
    source = write_fasta(place.folder / "many.fasta", entries)
    embed = script(
        "embed", "--esm-model", small_model, "--input", source, "--include", "mean", "per_tok"
    )
    assert embed.status == 0, embed.err
    before = place.files()
    to = place.folder / "out"
    flags = ["--run", "1", "--format", form, "--to", to, "--config", place.config]
    limited = partial(processes.limit_files, limit)
    with place.read_by_another():
        done = processes.run("export", *flags, prepare=limited)
    assert done.status == 4, done.err
    assert done.err.startswith(f"error: {to}")
    assert done.err.count("\n") == 1
    assert place.files() == before


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (
            ["--format", "npy", "--per-residue"],
            "format npy: no per-residue vectors, hdf5 and dataset have them",
        ),
        (
            ["--format", "csv", "--per-residue"],
            "format csv: no per-residue vectors, hdf5 and dataset have them",
        ),
        (["--format", "npy", "--dtype", "float16"], "format npy: float32 only, hdf5 has others"),
        (["--format", "hdf5", "--layer", "1"], "run 1: layer 1 is not kept, only 0 2"),
        (
            ["--format", "esm-extract", "--bos"],
            "format esm-extract: holds everything that was kept",
        ),
    ],
)
def test_what_a_format_does_not_hold_is_refused(
    script: Script, place: Place, rows: dict[int, Row], flags: list[str], fact: str
) -> None:
    answer = script("export", "--run", "1", "--to", place.folder / "out", *flags)
    assert (answer.status, answer.error) == (2, fact)
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize(("form", "name"), [("hdf5", "h5py"), ("anndata", "anndata")])
def test_a_missing_library_is_one_line(
    script: Script,
    place: Place,
    rows: dict[int, Row],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    answer = script("export", "--run", "1", "--format", form, "--to", place.folder / "out")
    assert (answer.status, answer.error) == (2, f"format {form}: {name} is not installed")


def test_make_hands_everything_on(place: Place, rows: dict[int, Row]) -> None:
    to = place.folder / "it's 50% $new.h5"
    done = make(
        "export", "ARGS=--partial --bos",
        variables={"RUN": "1", "FORMAT": "hdf5", "TO": str(to), "CONFIG": str(place.config)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with h5py.File(to, "r") as file:
        assert file.attrs["pooling"] == "bos"
        assert len(file) == len(rows)


def test_only_the_formats_of_torch_import_it() -> None:
    code = "import sys, scripts.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
