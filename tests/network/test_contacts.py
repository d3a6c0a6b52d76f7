"""Contacts: if this fails, predicted contacts are not fair-esm's, or of another regression."""

from __future__ import annotations

import pickle
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lib.embeddings import open_run
from lib.errors import SettingsError, WeightsError
from lib.files import file_sha256
from lib.ledger import checkpoints
from lib.ledger.footer import read_footer
from lib.models.detection import detect
from lib.models.regression import regression_path
from lib.models.untrained import make_folder
from lib.network import contacts
from lib.network.contacts import ContactMaps
from lib.settings import load_settings
from tests.adapters import factors, save_adapter
from tests.conftest import SOME_PROTEINS, UNIPROT_PART, Place, Script
from tests.jobs.test_resume import QUICK, killed_at
from tests.network.test_network import MIXED_PACK, contacts_of, load
from tests.reference import Reference, assert_same_bits, fasta, read_run, write_fasta


@pytest.fixture
def model(tmp_path: Path, small_model: Path) -> Path:
    """A copy of small_model with its contact regression, to be changed."""
    path = tmp_path / "esm2_mine.pt"
    shutil.copy(small_model, path)
    shutil.copy(regression_path(small_model), regression_path(path))
    return path


def test_maps_are_made_a_few_at_a_time_and_summed_up_all_the_same(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load(small_model)
    whole = contacts_of(network, MIXED_PACK)
    # Three heads of the longest (of four), and several sequences of the short ones.
    monkeypatch.setattr(contacts, "BLOCK_BYTES", 4 * 3 * (len(MIXED_PACK[0]) + 2) ** 2)
    for one, other in zip(whole, contacts_of(network, MIXED_PACK), strict=True):
        assert np.abs(one - other).max() <= 1e-6


def test_pack_mates_do_not_change_contacts(small_model: Path) -> None:
    network = load(small_model)
    together = contacts_of(network, MIXED_PACK)
    for sequence, one in zip(MIXED_PACK, together, strict=True):
        assert np.abs(contacts_of(network, [sequence])[0] - one).max() <= 1e-6


def test_a_run_keeps_contacts_of_every_record_and_its_vectors_as_they_were(
    script: Script, place: Place, small_model: Path
) -> None:
    entries = fasta(SOME_PROTEINS)
    source = write_fasta(place.folder / "twice.fasta", [*entries, ("again", entries[3][1])])
    flags = ["--esm-model", small_model, "--input", source, "--set", "input.max_residues=70"]
    assert script("embed", *flags, "--include", "mean", "contacts").status == 0
    assert script("embed", *flags, "--include", "mean").status == 0
    run = open_run(place.database, 1, verify=True)
    rows, plain = (read_run(place.output / f"run-00000{run}") for run in (1, 2))
    reference = Reference(small_model)
    for record, (_, sequence) in enumerate([*entries, entries[3]]):
        truth = reference.contacts(sequence[:70])
        found = rows[record]["contacts"]
        assert isinstance(found, np.ndarray)
        assert np.abs(found.reshape(truth.shape) - truth).max() <= 1e-5
        assert np.array_equal(run.contacts(record), found.reshape(truth.shape))
        mean, expected = rows[record]["mean_2"], plain[record]["mean_2"]
        assert isinstance(mean, np.ndarray)
        assert isinstance(expected, np.ndarray)
        assert mean.tobytes() == expected.tobytes()
    with pytest.raises(SettingsError, match="contacts is not kept, only mean"):
        open_run(place.database, 2).contacts(0)
    with pytest.raises(SettingsError, match="kind contacts: not mean or bos"):
        run.matrix("contacts")


def test_killed_and_resumed_gives_the_same_bits(
    script: Script, place: Place, small_model: Path
) -> None:
    flags: list[str | Path] = ["--esm-model", small_model, "--input", UNIPROT_PART, *QUICK]
    flags += ["--set", "input.max_residues=200", "--include", "contacts", "bos"]
    assert script("embed", *flags).status == 0
    killed_at(place, ("lib.ledger.commit.rename_into_place", "after", 2), "embed", *flags)
    killed_at(place, ("lib.network.pipeline.launch", "before", 3), "resume")
    answer = script("resume")
    assert answer.status == 0, answer.err
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")


def half_a_run(place: Place, model: Path) -> None:
    flags: list[str | Path] = ["--esm-model", model, "--input", SOME_PROTEINS, *QUICK]
    flags += ["--include", "contacts"]
    killed_at(place, ("lib.ledger.commit.add_checkpoint", "after", 1), "embed", *flags)


def test_the_regression_is_part_of_what_identifies_the_run(
    script: Script, place: Place, model: Path, other_model: Path
) -> None:
    half_a_run(place, model)
    sha256 = file_sha256(regression_path(model))
    footer = read_footer(place.output / "run-000001" / "checkpoint-000001.parquet")
    assert footer["identity"]["esm2_config"]["contact_regression_sha256"] == sha256
    assert footer["identity"]["esm2_config"]["sha256"] == file_sha256(model)
    assert script("validate", "--run", "1").status == 0
    shutil.copy(regression_path(other_model), regression_path(model))
    other = file_sha256(regression_path(model))
    for name in ("resume", "validate"):
        answer = script(name, "--run", "1")
        assert answer.status == 3, answer.err
        assert (
            f"run 1: sha256 of the contact regression is {sha256} in the run, {other} in "
            f"{regression_path(model)}" in answer.err + answer.out
        )
    regression_path(model).unlink()
    answer = script("resume")
    assert answer.status == 2
    assert "no contact regression: no esm2_mine-contact-regression.pt" in answer.error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("json_remove(esm2_config, '$.contact_regression_sha256')", "include is ['contacts']"),
        ("json_set(esm2_config, '$.contact_regression_sha256', 'f')", "regression_sha256 = 'f'"),
    ],
)
def test_a_snapshot_without_the_regression_is_refused(
    script: Script, place: Place, model: Path, change: str, said: str
) -> None:
    half_a_run(place, model)
    with closing(sqlite3.connect(place.database)) as connection, connection:
        connection.execute(f"UPDATE runs SET esm2_config = {change}")
    answer = script("resume")
    assert answer.status == 3
    assert said in answer.error


def test_runs_without_contacts_do_not_ask_for_a_regression(
    script: Script, place: Place, model: Path
) -> None:
    regression_path(model).unlink()
    answer = script("embed", "--esm-model", model, "--input", SOME_PROTEINS, "--json")
    assert answer.status == 0, answer.err
    assert "contact_regression_sha256" not in answer.json["model"]
    validation = script("validate", "--esm-model", model, "--set", "output.include=contacts")
    assert validation.status == 2
    assert "no contact regression" in validation.error
    assert len(list(place.output.iterdir())) == 1


def test_a_hugging_face_folder_has_its_regression_among_its_tensors(
    script: Script, place: Place, small_model: Path
) -> None:
    folder = place.folder / "folder"
    make_folder(folder, 2, 64, 4)
    for model in (folder, small_model):
        flags = ["--esm-model", model, "--input", SOME_PROTEINS, "--include", "contacts"]
        answer = script("embed", *flags, "--json")
        assert answer.status == 0, answer.err
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")
    snapshot = read_footer(place.output / "run-000001" / "checkpoint-000001.parquet")["identity"]
    config = snapshot["esm2_config"]
    assert config["contact_regression_sha256"] == config["sha256"]


def test_an_adapter_has_the_regression_of_its_base(tmp_path: Path, model: Path) -> None:
    module = "esm.encoder.layer.0.attention.self.query"
    adapter = save_adapter(tmp_path / "adapter", model, factors(module, 64, 64))
    found = detect(load_settings(overrides={"model.esm_model": str(adapter)}).model, contacts=True)
    assert found.regression is not None
    assert found.regression.path == regression_path(model)
    head = {"base_model.model.esm.contact_head.regression.weight": torch.ones(1, 8)}
    own = save_adapter(tmp_path / "own", model, factors(module, 64, 64) | head)
    with pytest.raises(WeightsError, match=r"own/adapter_model\.safetensors: tensor base_model\S+"):
        detect(load_settings(overrides={"model.esm_model": str(own)}).model, contacts=True)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


NAMES = "contact_head.regression.weight", "contact_head.regression.bias"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated, or not a torch.save archive"),
        ({"model": {}}, f"no tensor {NAMES[0]}"),
        ({"model": {NAMES[0]: torch.ones(1, 8)}}, f"no tensor {NAMES[1]}"),
        ({"model": [1]}, f"no tensor {NAMES[0]}"),
        (
            {"model": {NAMES[0]: torch.ones(1, 9), NAMES[1]: torch.ones(1)}},
            "has shape (1, 9), 2 layers of 4 heads have (1, 8)",
        ),
        (
            {"model": {NAMES[0]: torch.full((1, 8), torch.nan), NAMES[1]: torch.ones(1)}},
            "contains non-finite values",
        ),
        (
            {"model": {NAMES[0]: torch.ones(1, 1).expand(1, 8), NAMES[1]: torch.ones(1)}},
            "is not stored whole",
        ),
        ({"model": Hostile()}, "which is not in the allow-list"),
    ],
    ids=["empty", "none", "no bias", "a list", "another shape", "NaN", "inflated", "hostile"],
)
def test_what_is_no_regression_of_the_model_is_refused_in_one_line(
    script: Script, place: Place, model: Path, content: object, said: str
) -> None:
    if isinstance(content, bytes):
        regression_path(model).write_bytes(content)
    else:
        torch.save(content, regression_path(model), pickle_module=pickle)
    flags = ["--input", SOME_PROTEINS, "--include", "contacts"]
    answer = script("embed", "--esm-model", model, *flags)
    assert answer.status == 2
    assert said in answer.error
    assert str(regression_path(model)) in answer.error
    assert "ran" not in answer.out
    assert not place.output.exists()


def test_contacts_that_are_not_finite_name_the_record(
    script: Script, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_finish = ContactMaps.finish

    def finish(self: ContactMaps) -> list[torch.Tensor]:
        found = true_finish(self)
        found[0][0, 0] = torch.nan
        return found

    monkeypatch.setattr(ContactMaps, "finish", finish)
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, "--include", "contacts"]
    answer = script("embed", *flags)
    assert answer.status == 2
    assert answer.error.endswith("non-finite value in contacts")


def test_where_the_regression_lies_is_shown(script: Script, model: Path, place: Place) -> None:
    flags = ["--esm-model", model, "--input", SOME_PROTEINS, "--include", "contacts"]
    answer = script("embed", *flags)
    assert answer.status == 0, answer.err
    assert f"contact_regression  {regression_path(model)}" in answer.err


def test_a_sequence_that_many_records_share_is_written_in_parts(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_fasta(
        place.folder / "same.fasta", [(f"same{i}", "MKTAYIAKQR") for i in range(9)]
    )
    flags = ["--esm-model", small_model, "--input", source, "--include", "contacts", "mean"]
    assert script("embed", *flags).status == 0
    # Contacts of 10 residues and a mean of 64 numbers are 656 bytes.
    monkeypatch.setattr(checkpoints, "ROW_GROUP_BYTES", 3 * 656)
    assert script("embed", *flags).status == 0
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")
    (file,) = (place.output / "run-000002").glob("*.parquet")
    assert pq.ParquetFile(file).num_row_groups == 3


def test_contacts_that_no_list_can_hold_are_refused_before_the_run(
    script: Script, place: Place, small_model: Path
) -> None:
    source = write_fasta(place.folder / "long.fasta", [("titan", "M" * 46_341)])
    flags = ["--esm-model", small_model, "--input", source, "--include", "contacts"]
    answer = script("embed", *flags, "--set", "input.long_sequences=whole")
    assert answer.status == 2
    assert answer.error == (
        "include contacts: 46341 residues have 2147488281 contacts, a list of a checkpoint holds "
        "2147483647"
    )
    assert not place.output.exists()
