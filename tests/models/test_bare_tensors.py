"""Weights as people save their own: a .safetensors, a state dict, a checkpoint of Lightning.

If these fail, a lab's fine-tune has to be repacked by hand before it can be embedded, or is
embedded with tensors of something else. The checkpoints of Lightning and the state dicts of
transformers are real ones; vectors are compared with fair-esm's, or with those of transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.catalog import RELEASED
from lib.errors import WeightsError
from lib.models.detection import Detection, detect
from lib.models.fair_esm_file import FairEsmFile
from lib.models.formats import open_weights
from lib.models.regression import read_regression
from lib.models.tensor_names import hugging_face_name
from lib.models.untrained import make_folder, make_model
from lib.network.esm2 import load_network
from lib.sequences.alphabet import tokenise
from lib.settings import load_settings
from tests.adapters import TENSORS, save_adapter
from tests.catalogs import SMALL, release
from tests.conftest import DATA, SOME_PROTEINS, Place, Script
from tests.models.test_saved_by_transformers import SAVED, SEQUENCES, stored
from tests.models.test_weights import Call
from tests.reference import Array, Reference, worst_residue_error

LIGHTNING = DATA / "saved_by_lightning"
State = dict[str, torch.Tensor]
# Nothing but config.ini says it all: the tensors tell none of token dropout.
SHAPE = {"num_layers": 2, "hidden_dim": 64, "attention_heads": 4, "token_dropout": "yes"}


def found(path: Path, **said: object) -> Detection:
    overrides = {f"model.{key}": str(value) for key, value in {**SHAPE, **said}.items()}
    return detect(load_settings(overrides={"model.esm_model": str(path), **overrides}).model)


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        found(path)
    told = str(caught.value)
    assert told.startswith(f"{path}: "), told
    return told.removeprefix(f"{path}: ")


def vectors(detection: Detection) -> Array:
    """Every layer of SEQUENCES, (layers + 1, tokens, hidden_dim)."""
    network = load_network(detection, torch.device("cpu"), torch.float32)
    tokens = torch.from_numpy(tokenise(SEQUENCES))
    layers = range(detection.shape.num_layers + 1)
    lengths = [len(sequence) for sequence in SEQUENCES]
    hidden = [x.clone() for _, x in network.forward(tokens, lengths, layers)]
    return torch.stack(hidden).numpy()


def truth(model: Path) -> Array:
    """What fair-esm computes of SEQUENCES with a whole .pt, in the shape of `vectors`."""
    reference = Reference(model)
    layers = range(reference.num_layers + 1)
    parts = [reference.tokens(one.decode(), layers) for one in SEQUENCES]
    whole = [torch.cat([torch.from_numpy(part[layer]) for part in parts]) for layer in layers]
    return torch.stack(whole).numpy()


@pytest.fixture(scope="module")
def fair_esm_state(small_model: Path) -> State:
    """What `ESM2(...).state_dict()` gives, with its tied head."""
    weights = open_weights(small_model)
    assert isinstance(weights, FairEsmFile)
    state = {name: tensor.clone() for name, tensor in weights.read(weights.tensors)}
    contacts = read_regression(weights, 2, 4)
    state["contact_head.regression.weight"] = contacts.weight.reshape(1, -1)
    state["contact_head.regression.bias"] = torch.tensor([contacts.bias])
    return state | {"lm_head.weight": state["embed_tokens.weight"]}


@pytest.fixture(scope="module")
def transformers_state(fair_esm_state: State) -> State:
    """What `EsmForMaskedLM(...).state_dict()` gives, with frequencies of every layer."""
    state = {hugging_face_name(name): tensor for name, tensor in fair_esm_state.items()}
    return state | {"lm_head.decoder.weight": state["esm.embeddings.word_embeddings.weight"]}


@pytest.fixture(scope="module")
def expected(small_model: Path) -> Array:
    return truth(small_model)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_esm(state: State) -> State:
    """What `EsmModel(...).state_dict()` gives."""
    return {name[4:]: tensor for name, tensor in state.items() if name.startswith("esm.")}


HEAD = {"head.weight": torch.ones(2, 64), "head.bias": torch.ones(2)}
# What is saved, of fair-esm's and transformers' state dict; its format, and what is left out.
SAVED_AS: dict[str, tuple[Callable[[State, State], object], str, tuple[str, ...]]] = {
    "fair-esm": (lambda fair, _: fair, "fair-esm", ()),
    "EsmForMaskedLM": (lambda _, theirs: theirs, "state-dict", ()),
    "EsmModel": (lambda _, theirs: without_esm(theirs), "state-dict", ()),
    "data parallel": (lambda _, theirs: under("module.", theirs), "state-dict", ()),
    "compiled": (lambda fair, _: under("_orig_mod.", fair), "state-dict", ()),
    "model_state_dict": (
        lambda fair, _: {"epoch": 3, "model_state_dict": fair, "optimizer": {"lr": 0.1}},
        "state-dict",
        (),
    ),
    "a key of their own": (lambda _, theirs: {"net": theirs}, "state-dict", ()),
    "model": (lambda _, theirs: {"model": theirs}, "state-dict", ()),
    "a head beside it": (
        lambda fair, _: {"state_dict": under("model.esm2.", fair) | under("model.", HEAD)},
        "state-dict",
        ("model.head",),
    ),
}


@pytest.mark.parametrize("name", SAVED_AS)
def test_a_state_dict_has_the_vectors_of_fair_esm(
    tmp_path: Path, fair_esm_state: State, transformers_state: State, expected: Array, name: str
) -> None:
    save, kind, left_out = SAVED_AS[name]
    path = tmp_path / "tuned.pt"
    torch.save(save(fair_esm_state, transformers_state), path)
    detection = found(path)
    assert detection.require_weights().format == kind
    assert detection.require_weights().left_out == left_out
    assert (detection.name, detection.shape) == ("tuned", SMALL)
    assert worst_residue_error(vectors(detection), expected) < 1e-5


@pytest.mark.parametrize("kind", ["fair-esm", "transformers"])
def test_a_bare_safetensors_has_the_vectors_of_fair_esm(
    tmp_path: Path, fair_esm_state: State, transformers_state: State, expected: Array, kind: str
) -> None:
    state = fair_esm_state if kind == "fair-esm" else transformers_state
    tied = "lm_head.weight" if kind == "fair-esm" else "lm_head.decoder.weight"
    path = tmp_path / "tuned.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != tied}, path)
    detection = found(path)
    assert detection.require_weights().format == "safetensors"
    assert worst_residue_error(vectors(detection), expected) < 1e-5


@pytest.mark.parametrize("kind", ["fair-esm", "transformers"])
def test_a_checkpoint_of_lightning_has_the_vectors_of_fair_esm(tmp_path: Path, kind: str) -> None:
    drawn = tmp_path / "esm2_drawn.pt"
    make_model(drawn, 2, 16, 4, seed=11)
    detection = found(LIGHTNING / f"{kind}.ckpt", hidden_dim=16)
    assert detection.properties["left_out"].value == ("head",)
    assert detection.require_weights().format == "state-dict"
    assert worst_residue_error(vectors(detection), truth(drawn)) < 1e-5


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("4.57.6/EsmForSequenceClassification-bin", "pytorch_model.bin"),
        ("4.57.6/EsmModel-single", "model.safetensors"),
        ("5.5.4/EsmForMaskedLM-bin", "pytorch_model.bin"),
        ("5.6.2/EsmModel-bin", "pytorch_model.bin"),
        ("5.6.2/EsmForMaskedLM-single", "model.safetensors"),
        ("5.24.0/EsmForMaskedLM-bin", "pytorch_model.bin"),
        ("5.24.0/EsmForSequenceClassification-single", "model.safetensors"),
    ],
)
def test_what_transformers_saved_has_its_vectors_without_a_config(
    tmp_path: Path, folder: str, file: str
) -> None:
    path = tmp_path / file
    shutil.copy(SAVED / folder / file, path)
    ours = vectors(found(path, hidden_dim=16))
    theirs = stored((SAVED / folder).parent / "hidden_states.npz")
    assert worst_residue_error(ours, theirs) < 1e-5


def test_what_is_not_in_the_tensors_comes_from_config_ini(
    script: Script, tmp_path: Path, fair_esm_state: State
) -> None:
    path = tmp_path / "tuned.safetensors"
    save_file({k: v for k, v in fair_esm_state.items() if k != "lm_head.weight"}, path)
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    assert answer.error == (
        f"{path}: token_dropout not found in the weights, and config.ini does not give every "
        "property (it lacks num_layers, hidden_dim, attention_heads, token_dropout)"
    )
    said = [f"--set=model.{key}={value}" for key, value in SHAPE.items()]
    answer = script("detect", "--esm-model", path, *said)
    assert "attention_heads  4            override, tensor shapes" in answer.out
    assert "token_dropout    yes          override" in answer.out
    wrong = script("detect", "--esm-model", path, *said, "--set", "model.num_layers=3")
    assert wrong.error == f"[model] num_layers = 3 contradicts the tensors of {path}: 2"


@pytest.mark.parametrize("head", ["model.lm_head.decoder.weight", "decoder.weight"])
def test_a_tied_head_within_another_module_is_no_bomb(tmp_path: Path, head: str) -> None:
    """Before, one with a name of its own was counted as if the file had to hold it twice."""
    make_model(tmp_path / "m.pt", 1, 1024, 1, dtype=torch.float16)
    weights = open_weights(tmp_path / "m.pt")
    state = {f"model.{hugging_face_name(k)}": one for k, one in weights.read(weights.tensors)}
    tied = "model.esm.embeddings.word_embeddings.weight"
    state[head] = state.pop("model.lm_head.decoder.weight")
    assert state[tied].data_ptr() == state[head].data_ptr()
    torch.save({"state_dict": state}, tmp_path / "tuned.ckpt")
    shape = {"num_layers": 1, "hidden_dim": 1024, "attention_heads": 1}
    assert found(tmp_path / "tuned.ckpt", **shape).shape.hidden_dim == 1024


# ---- What is refused


def changed(state: State, **changes: torch.Tensor | None) -> State:
    """Add tensors, or take them away; `__` stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**state, **named}.items() if tensor is not None}


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


Broken = Callable[[State, State], object]
ONE = torch.ones(64)
REFUSED: dict[str, tuple[Broken, str]] = {
    "an unknown tensor of the trunk": (
        lambda fair, _: {"state_dict": under("model.", changed(fair, layers__0__gate=ONE))},
        "tensor model.layers.0.gate not part of an ESM-2 model",
    ),
    "an unknown tensor by transformers": (
        lambda _, theirs: changed(theirs, esm__encoder__layer__1__adapter__weight=ONE),
        "tensor esm.encoder.layer.1.adapter.weight not part of an ESM-2 model",
    ),
    "a missing tensor": (
        lambda _, theirs: under(
            "model.", changed(theirs, esm__encoder__layer__1__output__dense__bias=None)
        ),
        "tensor model.esm.encoder.layer.1.output.dense.bias missing",
    ),
    "two trunks": (
        lambda fair, _: {"state_dict": under("model.", fair) | under("ema.", copied(fair))},
        "two tensors are a token embedding: model.embed_tokens.weight and ema.embed_tokens.weight",
    ),
    "two state dicts": (
        lambda fair, theirs: {"student": fair, "teacher": theirs},
        "state dicts of ESM-2 in student, teacher: not one",
    ),
    "an adapter that is not merged": (
        lambda _, theirs: under("base_model.model.", changed(theirs, esm__q__lora_A__weight=ONE)),
        "tensor base_model.model.esm.q.lora_A.weight: a LoRA adapter that is not merged",
    ),
    "a name twice": (
        lambda _, theirs: changed(theirs, esm__layers__0__fc1__bias=torch.ones(256)),
        "two tensors are layers.0.fc1.bias: esm.encoder.layer.0.intermediate.dense.bias and "
        "esm.layers.0.fc1.bias",
    ),
    "absolute positions": (
        lambda _, theirs: changed(
            {name: tensor for name, tensor in theirs.items() if "inv_freq" not in name},
            esm__embeddings__position_embeddings__weight=torch.ones(8, 64),
        ),
        "tensor esm.embeddings.position_embeddings.weight without rotary frequencies (inv_freq): "
        "not an ESM-2 model",
    ),
    "frequencies of all and of one": (
        lambda _, theirs: changed(theirs, esm__rotary_embeddings__inv_freq=torch.ones(8)),
        "two tensors are rotary frequencies: esm.rotary_embeddings.inv_freq and "
        "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq",
    ),
    "ESM-1b": (
        lambda fair, _: under("model.", changed(fair, embed_positions__weight=torch.ones(8, 64))),
        "an ESM-1b or ESM-1v model (tensor embed_positions.weight), not ESM-2",
    ),
    "another network": (
        lambda *_: {"state_dict": {"conv.weight": ONE}, "epoch": 3},
        "no token embedding in state_dict: not an ESM-2 model",
    ),
    "a dictionary of other things": (lambda *_: {"state_dict": {}, "epoch": 3}, "holds no tensors"),
    "more than the file has": (
        lambda fair, _: {"state_dict": under("model.", changed(fair, a=ONE.expand(999, 64)))},
        "tensors claim ",
    ),
    "tensors that share their memory": (
        lambda fair, _: {
            "state_dict": under("model.", fair)
            | {f"x{i}.weight": fair["layers.0.fc1.weight"] for i in range(9)}
        },
        "tensors claim ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_whole_esm2_is_refused_with_what_it_is(
    tmp_path: Path, fair_esm_state: State, transformers_state: State, name: str
) -> None:
    save, fact = REFUSED[name]
    path = tmp_path / "tuned.ckpt"
    torch.save(save(fair_esm_state, transformers_state), path)
    told = refusal(path)
    assert told == fact or (fact.endswith(" ") and told.startswith(fact)), told


def test_other_safetensors_are_refused_with_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv.weight": ONE}, path)
    assert refusal(path) == (
        "no tensor embed_tokens.weight or embeddings.word_embeddings.weight: not an ESM-2 model"
    )
    path.write_bytes(b"not tensors")
    assert refusal(path).startswith("Error while deserializing header")
    lora = save_adapter(tmp_path / "lora", tmp_path / "base.pt", TENSORS)
    name = next(iter(TENSORS))
    told = refusal(lora / "adapter_model.safetensors")
    assert told == f"tensor {name}: a LoRA adapter that is not merged"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_a_folder_is_not_read_without_its_config(
    tmp_path: Path, transformers_state: State, name: str
) -> None:
    make_folder(tmp_path / "folder", 2, 64, 4)
    path = tmp_path / "folder" / name
    if path.suffix == ".bin":
        torch.save(transformers_state, path)
    assert refusal(path) == "part of the model that config.json of its folder describes"


@pytest.mark.filterwarnings("ignore")
def test_a_hostile_checkpoint_is_refused_and_nothing_runs(
    tmp_path: Path, fair_esm_state: State
) -> None:
    path, marker = tmp_path / "hostile.ckpt", tmp_path / "marker"
    hostile = Call(os.system, f"touch {marker}")
    torch.save({"state_dict": under("model.", fair_esm_state), "hyper_parameters": hostile}, path)
    assert refusal(path) == (
        "refused: its pickle asks for posix.system, which is not in the allow-list"
    )
    assert not marker.exists()


def test_a_change_while_it_is_read_is_refused(tmp_path: Path, transformers_state: State) -> None:
    path = tmp_path / "tuned.pt"
    torch.save(transformers_state, path)
    weights = found(path).require_weights()
    weights.refuse_if_changed()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(WeightsError, match="changed while it was being read"):
        weights.refuse_if_changed()


# ---- On the record


def test_a_run_is_recorded_verified_and_continued_with_the_very_file(
    script: Script, place: Place, fair_esm_state: State, other_model: Path
) -> None:
    for key, value in SHAPE.items():
        place.set("model", key, value)
    path = place.folder / "tuned.ckpt"
    torch.save({"state_dict": under("model.", fair_esm_state) | HEAD}, path)
    flags = ["--input", SOME_PROTEINS, "--include", "mean", "contacts", "--json"]
    answer = script("embed", "--esm-model", path, *flags)
    assert answer.status == 0, answer.err
    model = answer.json["model"]
    assert (model["weights_format"], model["released"]) == ("state-dict", False)
    assert model["contact_regression_sha256"] == model["sha256"]
    verified = script("verify", "--run", "1", "--sample", "2", "--json").json
    assert (verified["good"], verified["own_reader"]) == (True, f"{path} has no configuration")
    next((place.output / "run-000001").glob("*.parquet")).unlink()
    again = script("resume", "--run", "1", "--recompute-damaged")
    assert again.status == 0, again.err
    refused = script(
        "resume", "--run", "1", "--esm-model", other_model, "--set", "model.num_layers="
    )
    assert refused.status == 3
    assert "weights_format is state-dict in the run, fair-esm in " in refused.error


def test_an_adapter_may_lie_over_it(
    script: Script, place: Place, transformers_state: State
) -> None:
    for key, value in SHAPE.items():
        place.set("model", key, value)
    tied = "lm_head.decoder.weight"
    save_file(
        {name: tensor for name, tensor in transformers_state.items() if name != tied},
        place.folder / "base.safetensors",
    )
    lora = save_adapter(place.folder / "lora", "../base.safetensors", TENSORS)
    answer = script("embed", "--esm-model", lora, "--input", SOME_PROTEINS, "--json")
    assert answer.status == 0, answer.err
    assert answer.json["model"]["weights_format"] == "safetensors+lora"
    assert script("validate", "--run", "1").status == 0


def test_the_safetensors_of_a_release_are_released_without_their_folder(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "published", 2, 64, 4)
    monkeypatch.setitem(RELEASED, "esm2_t6_8M_UR50D", release(small_model, tmp_path / "published"))
    path = tmp_path / "mine.safetensors"
    shutil.copy(tmp_path / "published/model.safetensors", path)
    proof = found(path).take_proof()
    assert (str(proof), proof and proof.model) == ("yes (sha256)", "esm2_t6_8M_UR50D")
    state = load_file(path)
    state["lm_head.bias"] += 1
    save_file(state, path, metadata={"format": "pt"})
    assert str(found(path).take_proof()) == "no (sha256)"
    torch.save(state, tmp_path / "mine.pt")
    assert str(found(tmp_path / "mine.pt").take_proof()) == "no (format)"


def test_detection_shows_what_is_left_out(script: Script, place: Place) -> None:
    said: list[str | Path] = [
        f"--set=model.{k}={v}" for k, v in (SHAPE | {"hidden_dim": 16}).items()
    ]
    answer = script("detect", "--esm-model", LIGHTNING / "fair-esm.ckpt", *said)
    assert "left_out         head        beside the trunk\n" in answer.out
    content: dict[str, Any] = json.loads(
        script("detect", "--esm-model", LIGHTNING / "fair-esm.ckpt", *said, "--json").out
    )
    assert content["properties"]["left_out"] == {"value": ["head"], "source": "beside the trunk"}
