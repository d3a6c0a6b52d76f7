"""Names of models: if these fail, a history is full of `checkpoint-500` and of hashes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lib.models.detection
from lib.models.naming import model_name
from lib.models.untrained import make_folder
from tests.adapters import TENSORS, save_adapter
from tests.conftest import SOME_PROTEINS, Place, Script

HASH = "08e4846e537177426273712802403f7ba8261b6c"
SNAPSHOT = f"hub/models--our-lab--esm2-phages/snapshots/{HASH}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/tuned.pt", "tuned"),
        ("models/esm2_t6_8M_UR50D.pt", "esm2_t6_8M_UR50D"),
        ("models/phages-v1.2", "phages-v1.2"),
        ("models/model", "model"),
        ("/model.pt", "model"),
        ("phages/model.safetensors", "phages"),
        ("phages/pytorch_model.bin", "phages"),
        ("phages/epoch=3-step=500.ckpt", "epoch=3-step=500"),
        ("phages/checkpoint-500", "phages/checkpoint-500"),
        ("phages/checkpoint-500/model.safetensors", "phages/checkpoint-500"),
        ("phages/checkpoint-best", "checkpoint-best"),
        (SNAPSHOT, "esm2-phages"),
        (f"{SNAPSHOT}/model.safetensors", "esm2-phages"),
        (f"{SNAPSHOT}/checkpoint-500", "esm2-phages/checkpoint-500"),
        (f"snapshots/{HASH}", HASH),
    ],
)
def test_a_name_tells_which_training_or_repository_it_is(path: str, name: str) -> None:
    assert model_name(Path("/home/lab") / path) == name


def test_a_snapshot_and_an_adapter_of_a_training_are_shown_so(
    script: Script, place: Place, small_model: Path
) -> None:
    folder = place.folder / SNAPSHOT
    folder.parent.mkdir(parents=True)
    make_folder(folder, 2, 64, 4)
    assert script("detect", "--esm-model", folder, "--json").json["name"] == "esm2-phages"
    (place.folder / "phages").mkdir()
    lora = save_adapter(place.folder / "phages/checkpoint-500", small_model, TENSORS)
    assert script("detect", "--esm-model", lora, "--json").json["name"] == "phages/checkpoint-500"
    answer = script("embed", "--esm-model", lora, "--input", SOME_PROTEINS, "--json")
    assert answer.json["model"]["name"] == "phages/checkpoint-500"
    assert "phages/checkpoint-500" in script("history").out


def test_a_run_under_a_name_of_before_is_resumed(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = place.folder / "phages/checkpoint-500"
    make_folder(model, 2, 64, 4)
    lora = save_adapter(place.folder / "lora", "../phages/checkpoint-500", TENSORS)
    with monkeypatch.context() as patched:
        patched.setattr(lib.models.detection, "model_name", lambda path: path.name)
        for chosen in (model, lora):
            assert script("embed", "--esm-model", chosen, "--input", SOME_PROTEINS).status == 0
    for run, name in (("1", "checkpoint-500"), ("2", "lora")):
        shutil.rmtree(place.output / f"run-00000{run}")
        (place.output / f"run-00000{run}").mkdir()
        answer = script("resume", "--run", run, "--recompute-damaged", "--json")
        assert answer.status == 0, answer.err
        assert answer.json["model"]["name"] == name
        assert script("validate", "--run", run).status == 0
    assert script("validate", "--esm-model", model, "--input", SOME_PROTEINS).status == 0
