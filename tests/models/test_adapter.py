"""LoRA adapters: merged as PEFT merges them, and part of a run's identity.

If these fail, a lab's fine-tune is embedded as its base, or two adapters are mixed in one run.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import WeightsError
from lib.jobs.worker import Worker
from lib.models.adapter import base_settings, read_adapter
from lib.models.detection import detect
from lib.models.download import download_target
from lib.models.formats import open_weights
from lib.models.untrained import make_folder, make_model
from lib.settings import load_settings
from tests.adapters import FC1, QUERY, TENSORS, factors, save_adapter
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.models.test_huggingface import as_bin
from tests.models.test_weights import Call, found, hidden

NAME = "esm2_t6_8M_UR50D"


@pytest.fixture
def adapter(tmp_path: Path, small_model: Path) -> Path:
    """A LoRA of small_model."""
    return save_adapter(tmp_path / "lora", small_model, TENSORS)


def merged(path: Path) -> dict[str, torch.Tensor]:
    detection = found(path)
    assert detection.weights is not None
    names = [name for name in detection.weights.tensors if "_head." not in name]
    return {name: tensor.clone() for name, tensor in detection.weights.read(names)}


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        found(path)
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    return told.replace(f"{path}/", "").replace(f"{path}: ", "")


@pytest.mark.parametrize("alpha", ["1" + "0" * 400, "-1e999", "NaN", "true", '"8"'])
def test_an_alpha_that_is_no_finite_number_is_refused(adapter: Path, alpha: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {alpha}'))
    assert refusal(adapter).startswith("adapter_config.json has lora_alpha ")


def test_a_hostile_bin_is_refused_and_nothing_runs(adapter: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(TENSORS | {"extra": Call(os.mkdir, str(marker))}, adapter / "adapter_model.bin")
    fact = "refused: its pickle asks for posix.mkdir, which is not in the allow-list"
    assert refusal(adapter) == f"adapter_model.bin: {fact}"
    assert not marker.exists()


@pytest.mark.parametrize("rslora", [False, True])
def test_what_the_adapter_names_is_changed_and_nothing_else(
    tmp_path: Path, small_model: Path, rslora: bool
) -> None:
    path = save_adapter(tmp_path / "lora", small_model, TENSORS, use_rslora=rslora)
    scale = 8 / 2 if rslora else 8 / 4
    base, ours = merged(small_model), merged(path)
    changed = {"layers.0.self_attn.q_proj.weight": QUERY, "layers.1.fc1.weight": FC1}
    for name, tensor in base.items():
        expected = tensor
        if name in changed:
            stem = f"base_model.model.{changed[name]}"
            a, b = TENSORS[f"{stem}.lora_A.weight"], TENSORS[f"{stem}.lora_B.weight"]
            expected = (tensor.double() + scale * (b.double() @ a.double())).float()
            assert not torch.allclose(expected, tensor, rtol=1e-3)
        assert torch.allclose(ours[name], expected, rtol=0, atol=2e-6), name


def test_rank_and_alpha_may_differ_by_module(tmp_path: Path, small_model: Path) -> None:
    tensors = factors(QUERY, 64, 64) | factors(FC1, 256, 64, rank=2)
    patterns = {"rank_pattern": {"intermediate.dense": 2}, "alpha_pattern": {FC1: 3}}
    path = save_adapter(tmp_path / "lora", small_model, tensors, **patterns)
    stem = f"base_model.model.{FC1}"
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    expected = merged(small_model)["layers.1.fc1.weight"] + 1.5 * product
    assert torch.allclose(merged(path)["layers.1.fc1.weight"], expected, atol=2e-6)


def test_biases_and_saved_modules_stand_instead_of_the_bases(
    tmp_path: Path, small_model: Path
) -> None:
    stood = {
        f"base_model.model.{QUERY}.base_layer.bias": torch.full((64,), 0.5),
        "base_model.model.esm.encoder.emb_layer_norm_after.weight": torch.full((64,), 2.0),
        "base_model.model.classifier.dense.weight": torch.ones(3, 3),
    }
    path = save_adapter(
        tmp_path / "lora", small_model, TENSORS | stood,
        bias="lora_only", modules_to_save=["classifier", "emb_layer_norm_after"],
    )  # fmt: skip
    ours = merged(path)
    assert torch.equal(ours["layers.0.self_attn.q_proj.bias"], torch.full((64,), 0.5))
    assert torch.equal(ours["emb_layer_norm_after.weight"], torch.full((64,), 2.0))


def test_detection_shows_base_format_and_trunk(adapter: Path, small_model: Path) -> None:
    detection, base = found(adapter), found(small_model)
    assert detection.name == "lora"
    assert detection.properties["weights_format"].value == "fair-esm+lora"
    assert detection.properties["base"].value == str(small_model)
    assert detection.properties["base"].source == "adapter_config.json"
    assert detection.properties["parameters"] == base.properties["parameters"]
    assert detection.untrained


def test_the_digest_is_that_of_a_listing_of_adapter_and_base(
    adapter: Path, small_model: Path
) -> None:
    listing = (
        "(sha256sum adapter_config.json adapter_model.safetensors;"
        f" sha256sum < {small_model} | sed s/-/base/) | sha256sum"
    )
    told = subprocess.run(
        ["sh", "-c", listing], capture_output=True, text=True, check=True, cwd=adapter
    )
    weights = found(adapter).weights
    assert weights is not None
    assert weights.sha256() == told.stdout.split()[0]


def test_an_adapter_bin_is_the_same_adapter(adapter: Path, tmp_path: Path) -> None:
    expected = merged(adapter)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(adapter).items())


def test_a_change_of_either_while_it_is_read_is_refused(
    adapter: Path, tmp_path: Path, small_model: Path
) -> None:
    copy = tmp_path / "base.pt"
    copy.write_bytes(small_model.read_bytes())
    path = save_adapter(tmp_path / "other", copy, TENSORS)
    for file in (copy, path / "adapter_config.json"):
        weights = found(path).weights
        assert weights is not None
        weights.refuse_if_changed()
        file.write_bytes(file.read_bytes() + b" ")
        with pytest.raises(WeightsError, match="changed while it was being read"):
            weights.refuse_if_changed()


# ---- The base


def test_config_ini_may_say_where_the_base_lies(
    script: Script, place: Place, small_model: Path
) -> None:
    path = save_adapter(place.folder / "lora", "/elsewhere/esm2_small", TENSORS)
    answer = script("detect", "--esm-model", path)
    assert answer.error == (
        f"{path}: base_model_name_or_path '/elsewhere/esm2_small' is neither a released model nor "
        "a path that exists, and config.ini has no [model] base_model"
    )
    place.set("model", "base_model", small_model)
    answer = script("detect", "--esm-model", path, "--json")
    assert answer.json["properties"]["base"] == {"value": str(small_model), "source": "config"}


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("base.pt", "training/out/lora/base.pt"),
        ("../base.pt", "training/out/base.pt"),
        ("models/base.pt", "training/models/base.pt"),
        ("./models/base.pt", "training/models/base.pt"),
        ("out/base.pt", "training/out/base.pt"),
        ("training/models/base.pt", "training/models/base.pt"),
        ("elsewhere/base.pt", "training/out/base.pt"),
    ],
)
def test_a_relative_base_starts_where_the_adapter_was_trained_or_lies_beside_it(
    place: Place, small_model: Path, named: str, lies: str
) -> None:
    lora, base = place.folder / "training/out/lora", place.folder / lies
    for folder in (lora, base.parent):
        folder.mkdir(parents=True, exist_ok=True)
    base.symlink_to(small_model)
    save_adapter(lora, named, TENSORS)
    detected = found(lora).properties["base"]
    assert Path(str(detected.value)).resolve() == small_model
    assert Path(str(detected.value)).parent.resolve() == base.parent
    assert detected.source == "adapter_config.json"


def test_of_two_relative_bases_the_nearest_counts(
    place: Place, small_model: Path, other_model: Path
) -> None:
    lora = place.folder / "out/lora"
    lora.mkdir(parents=True)
    save_adapter(lora, "base.pt", TENSORS)
    (place.folder / "base.pt").symlink_to(other_model)
    (place.folder / "out/base.pt").symlink_to(small_model)
    assert found(lora).properties["base"].value == str(place.folder / "out/base.pt")


@pytest.mark.parametrize(
    "named", ["elsewhere/base.pt", "/elsewhere/base.pt", "org/base", "x" * 300]
)
def test_a_base_that_is_nowhere_is_one_line(place: Place, small_model: Path, named: str) -> None:
    path = save_adapter(place.folder / "lora", named, TENSORS)
    if named.startswith("/"):
        (place.folder / "base.pt").symlink_to(small_model)
    assert refusal(path) == (
        f"base_model_name_or_path {named!r} is neither a released model nor a path that exists, "
        "and config.ini has no [model] base_model"
    )


def test_a_base_that_contradicts_config_ini_is_refused(
    script: Script, place: Place, adapter: Path, small_model: Path, tall_model: Path
) -> None:
    place.set("model", "base_model", tall_model)
    answer = script("detect", "--esm-model", adapter)
    assert answer.status == 2
    assert answer.error == (
        f"{adapter}: base_model_name_or_path '{small_model}' contradicts [model] base_model = "
        f"{tall_model}"
    )


HUB = "/home/me/hub/models--our-lab--esm2-phages/snapshots/08e4846e537177426273712802403f7ba8261b6c"


@pytest.mark.parametrize(
    ("named", "lies", "same"),
    [
        ("our-lab/esm2-phages", HUB, True),
        ("our-lab/esm2-phages", HUB.replace("phages", "algae"), False),
        (HUB, "/data/esm2-phages", True),
        ("/train/phages/checkpoint-500", "/data/phages/checkpoint-500", True),
        ("checkpoint-500", "/data/phages/checkpoint-500", True),
        ("../checkpoint-500", "/data/phages/checkpoint-500", True),
        ("/train/algae/checkpoint-500", "/data/phages/checkpoint-500", False),
        ("phages/model.safetensors", "/data/phages", True),
        (f"facebook/{NAME}", f"/data/{NAME}.pt", True),
        (f"facebook/{NAME}", "esm2_t12_35M_UR50D", False),
    ],
)
def test_the_base_in_config_ini_is_the_named_one_if_models_of_both_have_one_name(
    place: Place, named: str, lies: str, same: bool
) -> None:
    """Before, last parts were compared: a snapshot of the Hub's cache could not be a base."""
    adapter = read_adapter(save_adapter(place.folder / "lora", named, TENSORS))
    model = load_settings(place.config, {"model.base_model": lies}).model
    if same:
        assert base_settings(model, adapter)[0].esm_model == lies
        return
    with pytest.raises(WeightsError, match=f"{named!r} contradicts "):
        base_settings(model, adapter)


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "lora", None, TENSORS)
    fact = "has no base_model_name_or_path and config.ini no [model] base_model"
    assert refusal(path) == f"adapter_config.json {fact}"


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path, adapter: Path) -> None:
    path = save_adapter(tmp_path / "second", adapter, TENSORS)
    assert refusal(path) == f"its base {adapter} is an adapter itself"


@pytest.mark.parametrize("name", ["facebook/esm2_t6_8M_UR50D", "esm2_t6_8M_UR50D"])
def test_a_released_base_is_found_where_releases_lie(place: Place, name: str) -> None:
    path = save_adapter(place.folder / "lora", name, factors(QUERY, 320, 320))
    model = load_settings(place.config, {"model.esm_model": str(path)}).model
    absent = detect(model)
    assert (absent.weights, absent.released, absent.name) == (None, "esm2_t6_8M_UR50D", "lora")
    target = download_target(load_settings(place.config, {"model.esm_model": name[-16:]}).model)
    make_model(target, 6, 320, 20)
    assert detect(model).properties["base"].value == str(target)


@pytest.mark.parametrize(
    ("named", "local"),
    [
        (NAME, NAME),
        (NAME, f"out/{NAME}"),
        (f"facebook/{NAME}", f"facebook/{NAME}"),
        (f"facebook/{NAME}", f"out/{NAME}"),
    ],
)
def test_a_base_that_may_be_a_release_or_a_local_model_is_refused(
    place: Place, named: str, local: str
) -> None:
    """Before, a lab's own model of this name was ignored, and the release changed instead."""
    (place.folder / "out").mkdir()
    lora = save_adapter(place.folder / "out/lora", named, factors(QUERY, 320, 320))
    folder = place.folder / local
    folder.mkdir(parents=True)  # as a training calls its output: not yet a model
    adapter, model = read_adapter(lora), load_settings(place.config).model
    assert base_settings(model, adapter)[0].esm_model == NAME
    (folder / "config.json").touch()
    assert refusal(lora) == (
        f"base_model_name_or_path {named!r} is a released model and also {folder}, and config.ini "
        "has no [model] base_model"
    )
    for said in (NAME, str(folder)):
        answer = base_settings(replace(model, base_model=said), adapter)
        assert (answer[0].esm_model, answer[1]) == (said, "config")


KNOWN = "c731040fcd8d73dceaa04b0a8e6329b345b0f5df"


@pytest.mark.parametrize("revision", [None, "main", KNOWN])
def test_a_revision_of_a_released_base_may_be_the_known_one(
    tmp_path: Path, revision: str | None
) -> None:
    tensors = factors(QUERY, 320, 320)
    assert found(save_adapter(tmp_path / "lora", NAME, tensors, revision=revision)).released == NAME


@pytest.mark.parametrize(
    ("name", "revision", "known"),
    [
        (f"facebook/{NAME}", "refs/pr/2", KNOWN),
        (NAME, KNOWN[:7], KNOWN),
        ("esm2_t48_15B_UR50D", KNOWN, "not known"),
    ],
)
def test_another_revision_of_a_released_base_is_refused(
    place: Place, small_model: Path, name: str, revision: str, known: str
) -> None:
    """Before, the known commit was taken instead, where PEFT takes this one."""
    path = save_adapter(place.folder / "lora", name, TENSORS, revision=revision)
    released = name.removeprefix("facebook/")
    fact = f"revision {revision!r} of its base, that of {released} is {known}"
    assert refusal(path) == f"adapter_config.json: {fact}"
    model = load_settings(place.config, {"model.base_model": released}).model
    with pytest.raises(WeightsError, match="of its base, that of"):
        base_settings(model, read_adapter(path))
    local = place.folder / f"{released}.pt"
    assert base_settings(replace(model, base_model=str(local)), read_adapter(path))


# ---- Adapters that are not a plain LoRA of this base


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', not 'LORA'"),
        ({"use_dora": True}, "use_dora = True: not a plain LoRA adapter"),
        ({"lora_bias": True}, "lora_bias = True: not a plain LoRA adapter"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True: not a plain LoRA adapter"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = [[0, 1]]: not a plain LoRA adapter"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa: changes its base"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"modules_to_save": "x"}, "modules_to_save is not a list"),
    ],
)
def test_other_adapters_are_refused(
    tmp_path: Path, small_model: Path, changes: dict[str, object], fact: str
) -> None:
    path = save_adapter(tmp_path / "lora", small_model, TENSORS, **changes)
    assert refusal(path) == f"adapter_config.json: {fact}"


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"r": 8}, f"{FC1} has rank 4, adapter_config.json says 8"),
        ({"lora_alpha": None}, f"adapter_config.json has lora_alpha None for {FC1}"),
        ({"alpha_pattern": {"(": 3}}, "adapter_config.json has the alpha_pattern '('"),
    ],
)
def test_ranks_and_scales_that_are_none_are_refused(
    tmp_path: Path, small_model: Path, changes: dict[str, object], fact: str
) -> None:
    path = save_adapter(tmp_path / "lora", small_model, factors(FC1, 256, 64), **changes)
    assert refusal(path) == fact


@pytest.mark.parametrize(
    ("tensors", "fact"),
    [
        (factors("esm.encoder.layer.7.output.dense", 64, 256), "does not fit any module of "),
        (factors("vit.blocks.0.attn", 64, 64), "does not fit any module of "),
        (factors(QUERY, 64, 32), "belongs to a matrix or vector of shape (64, 32), "),
        ({"base_model.model.esm.encoder.x": torch.ones(2)}, "does not fit any module of "),
        (dict(list(factors(QUERY, 64, 64).items())[:1]), "has no counterpart"),
        (
            {f"base_model.model.{QUERY}.modules_to_save.bias": torch.ones(64)},
            "a bias twice, by bias and modules_to_save",
        ),
        (
            {f"base_model.model.{QUERY}.lora_magnitude_vector": torch.ones(2)},
            "is not a factor of a linear module",
        ),
    ],
)
def test_tensors_that_fit_nothing_are_refused_by_name(
    tmp_path: Path, small_model: Path, tensors: dict[str, torch.Tensor], fact: str
) -> None:
    told = refusal(save_adapter(tmp_path / "lora", small_model, tensors))
    assert any(told.startswith(f"adapter_model.safetensors: tensor {name}") for name in tensors)
    assert fact in told


def test_an_adapter_of_a_head_alone_is_refused(tmp_path: Path, small_model: Path) -> None:
    path = save_adapter(tmp_path / "lora", small_model, factors("lm_head.dense", 64, 64))
    fact = "holds no tensor of an embedding trunk"
    assert refusal(path) == f"adapter_model.safetensors: {fact}"


def test_a_configuration_without_tensors_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    told = refusal(adapter)
    fact = "without adapter_model.safetensors or adapter_model.bin"
    assert told == f"adapter_config.json {fact}"


# ---- Identity


def resumed(script: Script, adapter: Path) -> Any:  # noqa: ANN401
    return script("resume", "--run", "1", "--esm-model", adapter)


def test_a_run_is_only_continued_with_the_very_adapter(
    script: Script, place: Place, adapter: Path, small_model: Path, other_model: Path
) -> None:
    answer = script("embed", "--esm-model", adapter, "--input", SOME_PROTEINS, "--json")
    assert answer.status == 0, answer.err
    assert answer.json["model"]["weights_format"] == "fair-esm+lora"
    copy = place.folder / "copy"
    others = {
        "tensors": ({name: tensor + 1 for name, tensor in TENSORS.items()}, small_model, {}),
        "rank": (
            factors(QUERY, 64, 64, rank=2) | factors(FC1, 256, 64, rank=2),
            small_model,
            {"r": 2},
        ),
        "scale": (TENSORS, small_model, {"lora_alpha": 16}),
        "base": (TENSORS, other_model, {}),
    }
    for tensors, base, changes in others.values():
        answer = resumed(script, save_adapter(copy, base, tensors, **changes))
        assert answer.status == 3
        assert answer.error.startswith("run 1: sha256 of the weights is ")
    assert resumed(script, small_model).error.startswith("run 1: weights_format is fair-esm+lora")
    (copy / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(TENSORS, copy / "adapter_model.safetensors")
    assert resumed(script, copy).status == 0


def test_the_base_is_in_snapshot_database_and_footer(
    script: Script, place: Place, adapter: Path, small_model: Path
) -> None:
    """Before, nothing on record said which model an adapter had changed."""
    answer = script("embed", "--esm-model", adapter, "--input", SOME_PROTEINS, "--json")
    assert answer.status == 0, answer.err
    base = ("esm2_small", open_weights(small_model).sha256())
    snapshot = answer.json["model"]
    assert (snapshot["base_name"], snapshot["base_sha256"]) == base
    (file,) = place.output.rglob("*.parquet")
    assert all(word.encode() in file.read_bytes() for word in base)
    query = "select base_name, base_sha256 from models"
    assert script("query", query, "--json").json == [{"base_name": base[0], "base_sha256": base[1]}]
    shown = f"{base[0]} (sha256 {base[1]})"
    assert script("history", "--json").json[0]["base"] == shown
    assert f"base                 {shown}" in script("history", "--run", "1").out
    assert f"base_sha256      {base[1]}" in resumed(script, adapter).err


@pytest.mark.parametrize("named", [None, "esm2_small.pt"])
def test_a_base_that_was_renamed_is_the_same_base(
    script: Script, place: Place, small_model: Path, other_model: Path, named: str | None
) -> None:
    """Before, that of an adapter which names its base could not continue a run."""
    path = save_adapter(place.folder / "lora", named, TENSORS)
    place.set("model", "base_model", small_model)
    assert script("embed", "--esm-model", path, "--input", SOME_PROTEINS).status == 0
    renamed, other = place.folder / "renamed.pt", place.folder / "other.pt"
    renamed.write_bytes(small_model.read_bytes())
    other.write_bytes(other_model.read_bytes())
    answer = script("resume", "--run", "1", "--set", f"model.base_model={other}")
    assert answer.status == 3
    assert answer.error.startswith("run 1: sha256 of the weights is ")
    answer = script("resume", "--run", "1", "--set", f"model.base_model={renamed}")
    assert answer.status == 0, answer.err
    said = {"model.esm_model": str(path), "model.base_model": str(renamed)}
    worker = Worker(load_settings(place.config, said))
    assert worker.readiness.config["base_sha256"] == open_weights(small_model).sha256()


# ---- PEFT itself


@pytest.mark.xdist_group("transformers")  # imported by one process
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["EsmModel", "EsmForSequenceClassification", "EsmForMaskedLM"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": "all-linear", "use_rslora": True, "bias": "all"},
        {
            "target_modules": ["query", "dense"],
            "rank_pattern": {"output.dense": 2},
            "alpha_pattern": {"query": 5},
            "bias": "lora_only",
        },
        {"target_modules": ["query", "value"], "init_lora_weights": "eva"},
        {
            "target_modules": ["query", "value"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
    ],
    ids=["plain", "rslora", "patterns", "eva", "tied"],
)
def test_the_merged_tensors_are_those_of_peft(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    import peft
    import transformers

    make_folder(tmp_path / "hf", 2, 64, 4)
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "hf", dtype=torch.float32)
    task = "SEQ_CLS" if kind == "EsmForSequenceClassification" else None
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        loaded, peft.LoraConfig(r=4, lora_alpha=6, task_type=task, **options)
    )
    if "init_lora_weights" in options:
        batches = [
            {"input_ids": tokens, "attention_mask": tokens > 0}
            for tokens in torch.randint(4, 24, (4, 4, 30))
        ]
        peft.initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:  # as training leaves them; B begins as zeros
                parameter.add_(torch.randn_like(parameter) * (0.3 if "lora_B" in name else 0.05))
    adapted.save_pretrained(str(tmp_path / "lora"))
    whole: Any = adapted.base_model
    whole.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, theirs = merged(tmp_path / "hf"), merged(tmp_path / "merged")
    ours = merged(tmp_path / "lora")
    common = ours.keys() & theirs.keys()
    assert set(base) & set(theirs) == common
    assert sum(not torch.equal(ours[name], base[name]) for name in common) >= 4
    for name in common:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6), name
    layers = zip(hidden(tmp_path / "lora"), hidden(tmp_path / "merged"), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in layers)


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors in shards", "bin in shards"])
def test_a_folder_with_a_whole_model_as_well_is_refused(
    tmp_path: Path, small_model: Path, form: str
) -> None:
    """Before, only model.safetensors was looked for."""
    path = tmp_path / "both"
    make_folder(path, 2, 64, 4)
    name, shards = "model.safetensors", 2 if "shards" in form else 1
    if "bin" in form:
        as_bin(path, load_file(path / name), shards)
    elif shards == 2:
        part = "model-00001-of-00001.safetensors"
        index = {"weight_map": dict.fromkeys(load_file(path / name), part)}
        (path / name).rename(path / part)
        (path / f"{name}.index.json").write_text(json.dumps(index))
    save_adapter(path, small_model, TENSORS)
    assert refusal(path) == "holds an adapter and a whole model"
    assert open_weights(path).format == "huggingface"
