"""Detection of a model's properties from metadata, tensor names and shapes.

If these fail, a user's vectors are computed with a wrong shape, head count or scale, or with a
model that is not the one that was named, and nobody is told.
"""

from __future__ import annotations

import argparse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import esm
import pytest
import torch
from esm.model.esm1 import ProteinBertModel
from esm.model.esm2 import ESM2
from esm.model.msa_transformer import MSATransformer

from lib.catalog import RELEASED
from lib.errors import LedgerError, SettingsError, WeightsError
from lib.models.detection import Detection, detect
from lib.models.layers import select_layers
from lib.models.untrained import make_model
from lib.settings import load_settings
from schema.esm2_config import ModelShape
from tests.conftest import Place, Script

TRUNK = "encoder.sentence_encoder."
INV_FREQ = "self_attn.rot_emb.inv_freq"
ALL_FOUR = {"num_layers": "2", "hidden_dim": "64", "attention_heads": "4", "token_dropout": "no"}

SMALL = ModelShape(2, 64, 4, True)

State = dict[str, torch.Tensor]
Save = Callable[..., Path]


@pytest.fixture(scope="session")
def like_8m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights in the shape of esm2_t6_8M_UR50D, float32, 30 MB."""
    path = tmp_path_factory.mktemp("like") / "esm2_t6_8M_UR50D.pt"
    make_model(path, 6, 320, 20)
    return path


@pytest.fixture
def archive(small_model: Path) -> dict[str, Any]:
    """What small_model holds, to be changed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded: dict[str, Any] = torch.load(small_model, weights_only=True)
    return loaded


@pytest.fixture
def state(archive: dict[str, Any]) -> State:
    """The state dict of small_model, to be changed."""
    tensors: State = archive["model"]
    return tensors


@pytest.fixture
def save(tmp_path: Path, archive: dict[str, Any]) -> Save:
    """Save a state dict, beside small_model's cfg unless keys are given."""

    def write(state: Mapping[str, object], **keys: object) -> Path:
        path = tmp_path / "changed.pt"
        torch.save({**(keys or {"cfg": archive["cfg"]}), "model": state}, path)
        return path

    return write


def found(place: Place, model: str | Path, **overrides: str) -> Detection:
    said = {f"model.{option}": value for option, value in overrides.items()}
    return detect(load_settings(place.config, {"model.esm_model": str(model), **said}).model)


def refusal(kind: type[LedgerError], place: Place, model: str | Path, **overrides: str) -> str:
    """The one line with which a model is refused, without the model's path."""
    with pytest.raises(kind) as caught:
        found(place, model, **overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{model}: ")


def values(detection: Detection) -> dict[str, object]:
    return {key: prop.value for key, prop in detection.properties.items()}


def sources(detection: Detection) -> dict[str, str]:
    return {key: prop.source for key, prop in detection.properties.items()}


def cut(state: State, *parts: str) -> State:
    """The tensors whose names have none of `parts`."""
    kept = {name: value for name, value in state.items() if not any(p in name for p in parts)}
    assert len(kept) < len(state)
    return kept


# ---- What is detected, and from where


def test_properties_come_from_metadata_and_tensors(place: Place, small_model: Path) -> None:
    detection = found(place, small_model)
    assert values(detection) == {
        "num_layers": 2,
        "hidden_dim": 64,
        "attention_heads": 4,
        "token_dropout": True,
        "repr_layers": (2,),
        "parameters": SMALL.parameters,
        "weights_format": "fair-esm",
        "dtype": "float32",
    }
    both = "checkpoint metadata, tensor shapes"
    assert sources(detection) == {
        "num_layers": both,
        "hidden_dim": both,
        "attention_heads": both,
        "token_dropout": "checkpoint metadata",
        "repr_layers": "last layer",
        "parameters": "tensor shapes",
        "weights_format": "file",
        "dtype": "tensors",
    }
    assert detection.name == "esm2_small"


def test_the_parameter_count_is_that_of_the_tensors(state: State) -> None:
    trunk = [state[TRUNK + name] for name in SMALL.trunk_shapes()]
    assert SMALL.parameters == sum(tensor.numel() for tensor in trunk)


@pytest.mark.parametrize("name", RELEASED)
def test_catalog_shapes_are_those_of_the_name(name: str) -> None:
    # esm2_t6_8M_UR50D: 6 layers and 8 million parameters, generously rounded (7.5 million).
    layers, size = name.split("_")[1:3]
    assert RELEASED[name].shape.num_layers == int(layers[1:])
    scale = {"M": 1e6, "B": 1e9}[size[-1]]
    assert RELEASED[name].shape.parameters == pytest.approx(float(size[:-1]) * scale, rel=0.08)


@pytest.mark.parametrize("name", RELEASED)
def test_catalog_shapes_are_the_tensors_of_fair_esms_network(name: str) -> None:
    shape = RELEASED[name].shape
    with torch.device("meta"):
        network = ESM2(shape.num_layers, shape.hidden_dim, shape.attention_heads)
    tensors = {part: tuple(tensor.shape) for part, tensor in network.named_parameters()}
    trunk = {
        part: dimensions
        for part, dimensions in tensors.items()
        if not part.startswith(("lm_head.", "contact_head."))
    }
    assert trunk == shape.trunk_shapes()


def test_the_script_prints_values_with_sources(script: Script, small_model: Path) -> None:
    answer = script("detect", "--esm-model", small_model)
    assert answer.status == 0
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in answer.out.splitlines()}
    assert rows["name"].split() == ["esm2_small", str(small_model)]
    assert rows["num_layers"] == "2           checkpoint metadata, tensor shapes"
    assert rows["token_dropout"].split(maxsplit=1) == ["yes", "checkpoint metadata"]
    assert rows["repr_layers"].split(maxsplit=1) == ["2", "last layer"]
    assert "mean nothing" in rows["untrained"]


def test_the_script_prints_json_with_sources(script: Script, small_model: Path) -> None:
    detected = script("detect", "--json", "--esm-model", small_model).json
    assert detected["name"] == "esm2_small"
    assert detected["path"] == str(small_model)
    assert detected["untrained"] is True
    assert detected["properties"]["hidden_dim"] == {
        "value": 64,
        "source": "checkpoint metadata, tensor shapes",
    }
    assert detected["properties"]["repr_layers"] == {"value": [2], "source": "last layer"}


def test_token_dropout_is_what_the_metadata_says(place: Place, tmp_path: Path) -> None:
    make_model(tmp_path / "m.pt", 1, 16, 2, token_dropout=False)
    assert values(found(place, tmp_path / "m.pt"))["token_dropout"] is False


# ---- Where a released name is looked for


def put(like_8m: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / like_8m.name).symlink_to(like_8m)
    return folder / like_8m.name


def test_a_released_name_is_looked_for_in_the_weights_directory_first(
    place: Place, like_8m: Path
) -> None:
    cached = put(like_8m, place.folder / "torch_home/hub/checkpoints")
    mine = put(like_8m, place.folder / "weights")
    detection = found(place, "esm2_t6_8M_UR50D", weights_directory=str(mine.parent))
    assert detection.weights is not None
    assert detection.weights.path == mine
    mine.unlink()
    detection = found(place, "esm2_t6_8M_UR50D", weights_directory=str(mine.parent))
    assert detection.weights is not None
    assert detection.weights.path == cached


def test_a_released_name_on_disk_agrees_with_metadata_tensors_and_catalog(
    place: Place, like_8m: Path
) -> None:
    put(like_8m, place.folder / "torch_home/hub/checkpoints")
    detection = found(place, "esm2_t6_8M_UR50D")
    assert sources(detection)["hidden_dim"] == "checkpoint metadata, tensor shapes, catalog"
    assert sources(detection)["token_dropout"] == "checkpoint metadata, catalog"
    assert sources(detection)["repr_layers"] == "catalog"
    assert values(detection)["attention_heads"] == 20


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_name_that_is_nowhere_shows_the_catalog_and_downloads_nothing(
    script: Script, place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("detection opened a connection")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    place.set("model", "weights_directory", place.folder / "weights")
    answer = script("detect", "--json", "--esm-model", name)
    assert answer.status == 0
    assert answer.json["path"] is None
    layers = RELEASED[name].shape.num_layers
    marked = "catalog (weights not on disk)"
    assert answer.json["properties"]["num_layers"] == {"value": layers, "source": marked}
    assert answer.json["properties"]["repr_layers"]["value"] == [layers]
    assert [path.name for path in place.folder.iterdir()] == ["config.ini"]


@pytest.mark.parametrize(
    "name",
    ["650M", "esm2_t33_650M", "esm2_t33", "ESM2_T33_650M_UR50D", "esm2_t33_650M_UR50D.pt", "esm2"],
)
def test_abbreviations_are_refused(script: Script, name: str) -> None:
    answer = script("detect", "--esm-model", name)
    assert answer.status == 2
    assert f"{name!r} is not one of the released names esm2_t6_8M_UR50D, " in answer.error
    assert "no such file or folder" in answer.error


def test_a_path_that_does_not_exist_is_refused(script: Script, tmp_path: Path) -> None:
    answer = script("detect", "--esm-model", tmp_path / "missing.pt")
    assert answer.status == 2
    assert answer.error.startswith(f"esm_model {tmp_path}/missing.pt: no such file or folder")


@pytest.mark.parametrize(
    ("shape", "fact"),
    [
        ((2, 320, 20), "num_layers is 2 by checkpoint metadata, 6 by catalog"),
        ((6, 160, 20), "hidden_dim is 160 by checkpoint metadata, 320 by catalog"),
        ((6, 320, 10), "attention_heads is 10 by checkpoint metadata, 20 by catalog"),
    ],
)
def test_a_released_name_with_other_tensors_is_refused(
    place: Place, shape: tuple[int, int, int], fact: str
) -> None:
    path = place.folder / "weights/esm2_t6_8M_UR50D.pt"
    make_model(path, *shape, dtype=torch.float16)
    told = refusal(WeightsError, place, path.stem, weights_directory=str(path.parent))
    assert told == f"{path}: {fact}"


def test_a_released_name_that_says_no_token_dropout_is_refused(place: Place) -> None:
    path = place.folder / "weights/esm2_t6_8M_UR50D.pt"
    make_model(path, 6, 320, 20, dtype=torch.float16, token_dropout=False)
    told = refusal(WeightsError, place, path.stem, weights_directory=str(path.parent))
    assert told == f"{path}: token_dropout is no by checkpoint metadata, yes by catalog"


# ---- Overrides


def test_overrides_that_agree_are_named_as_sources(place: Place, small_model: Path) -> None:
    detection = found(place, small_model, num_layers="2", token_dropout="no")
    assert sources(detection)["num_layers"] == "override, tensor shapes"
    assert sources(detection)["token_dropout"] == "override"
    assert values(detection)["token_dropout"] is False


@pytest.mark.parametrize(
    ("option", "said", "shown"),
    [("num_layers", "3", 2), ("hidden_dim", "128", 64), ("attention_heads", "8", 4)],
)
def test_overrides_that_the_tensors_contradict_are_refused(
    place: Place, small_model: Path, option: str, said: str, shown: int
) -> None:
    told = refusal(SettingsError, place, small_model, **{option: said})
    fact = f"[model] {option} = {said} contradicts the tensors of {small_model}: {shown}"
    assert told == fact


@pytest.mark.parametrize(
    ("option", "said", "shown"),
    [
        ("num_layers", "7", "6"),
        ("hidden_dim", "640", "320"),
        ("attention_heads", "10", "20"),
        ("token_dropout", "no", "yes"),
    ],
)
def test_overrides_that_the_catalog_contradicts_are_refused(
    place: Place, option: str, said: str, shown: str
) -> None:
    told = refusal(SettingsError, place, "esm2_t6_8M_UR50D", **{option: said})
    assert told == f"[model] {option} = {said} contradicts esm2_t6_8M_UR50D: {shown}"


@pytest.mark.parametrize("heads", ["5", "64", "128"])
def test_head_counts_that_do_not_divide_the_width_are_refused(
    place: Place, save: Save, state: State, heads: str
) -> None:
    path = save(cut(state, "inv_freq"))
    told = refusal(WeightsError, place, path, attention_heads=heads)
    assert told == f"hidden_dim 64 does not divide into {heads} heads of even width"


# ---- Weights that do not say everything


def test_a_bare_state_dict_lacks_token_dropout(place: Place, save: Save, state: State) -> None:
    path = save(state, note="no cfg")
    assert refusal(WeightsError, place, path) == (
        "token_dropout not found in the weights, and config.ini does not give every property "
        "(it lacks num_layers, hidden_dim, attention_heads, token_dropout)"
    )


@pytest.mark.parametrize("unsaid", ALL_FOUR)
def test_some_properties_from_config_are_not_enough(
    place: Place, save: Save, state: State, unsaid: str
) -> None:
    said = {option: value for option, value in ALL_FOUR.items() if option != unsaid}
    told = refusal(WeightsError, place, save(state, note="no cfg"), **said)
    assert "token_dropout not found in the weights" in told
    assert told.endswith(f"(it lacks {unsaid})")


def test_every_property_from_config_is_enough(place: Place, save: Save, state: State) -> None:
    detection = found(place, save(state, note="no cfg"), **ALL_FOUR)
    assert values(detection)["token_dropout"] is False
    assert sources(detection)["token_dropout"] == "override"
    assert sources(detection)["attention_heads"] == "override, tensor shapes"


def test_heads_come_from_inv_freq_and_are_missing_without_it(
    place: Place, save: Save, state: State, archive: dict[str, Any]
) -> None:
    without = argparse.Namespace(**vars(archive["cfg"]["model"]))
    del without.encoder_attention_heads
    cfg = {"model": without}
    detection = found(place, save(state, cfg=cfg))
    assert values(detection)["attention_heads"] == 4
    assert sources(detection)["attention_heads"] == "tensor shapes"
    told = refusal(WeightsError, place, save(cut(state, "inv_freq"), cfg=cfg))
    assert told.startswith("attention_heads not found in the weights")


def test_all_that_is_missing_is_named(place: Place, save: Save, state: State) -> None:
    told = refusal(WeightsError, place, save(cut(state, "inv_freq"), note="no cfg"))
    assert told.startswith("attention_heads, token_dropout not found in the weights")


def test_names_without_prefix_are_read_too(place: Place, save: Save, state: State) -> None:
    plain = {name.removeprefix(TRUNK): value for name, value in state.items()}
    assert values(found(place, save(plain))) == values(found(place, save(state)))


@pytest.mark.parametrize("shape", [(7,), (64,), (0,), (2, 4), ()])
def test_inv_freq_that_fits_no_heads_is_refused(
    place: Place, save: Save, state: State, shape: tuple[int, ...]
) -> None:
    state[f"{TRUNK}layers.0.{INV_FREQ}"] = torch.ones(shape)
    told = refusal(WeightsError, place, save(state))
    fact = f"rot_emb.inv_freq has shape {shape}, which does not fit the heads of any model of"
    assert told == f"{fact} hidden_dim 64"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("encoder_layers", "num_layers", "2"),
        ("encoder_layers", "num_layers", -2),
        ("encoder_embed_dim", "hidden_dim", 64.0),
        ("encoder_embed_dim", "hidden_dim", [64]),
        ("encoder_attention_heads", "attention_heads", True),
        ("encoder_attention_heads", "attention_heads", torch.ones(50, 50)),
        ("encoder_attention_heads", "attention_heads", "x\ny" * 1000),
        ("token_dropout", "token_dropout", 1),
        ("token_dropout", "token_dropout", "True"),
        ("token_dropout", "token_dropout", "x" * 100_000),
        ("token_dropout", "token_dropout", torch.ones(50, 50)),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused(
    place: Place,
    save: Save,
    state: State,
    archive: dict[str, Any],
    word: str,
    key: str,
    value: Any,  # noqa: ANN401
) -> None:
    setattr(archive["cfg"]["model"], word, value)
    told = refusal(WeightsError, place, save(state, cfg=archive["cfg"]))
    assert told.startswith(f"metadata has {key} = ")
    assert len(told) < 300


@pytest.mark.parametrize("cfg", [None, "esm2", 7, {}, {"model": None}, {"model": [1]}])
def test_a_cfg_of_the_wrong_kind_says_nothing(
    place: Place, save: Save, state: State, cfg: object
) -> None:
    assert refusal(WeightsError, place, save(state, cfg=cfg)).startswith("token_dropout not found")


def test_metadata_that_the_tensors_contradict_is_refused(
    place: Place, save: Save, state: State, archive: dict[str, Any]
) -> None:
    archive["cfg"]["model"].encoder_embed_dim = 128
    told = refusal(WeightsError, place, save(state, cfg=archive["cfg"]))
    assert told == "hidden_dim is 128 by checkpoint metadata, 64 by tensor shapes"


# ---- Weights that are not whole


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> State:
    path = tmp_path_factory.mktemp("three") / "m.pt"
    make_model(path, 3, 64, 4)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: State = torch.load(path, weights_only=True)["model"]
    return state


@pytest.mark.parametrize("layer", [0, 1])
def test_a_missing_layer_is_refused(
    place: Place, save: Save, three_layers: State, layer: int
) -> None:
    path = save(cut(three_layers, f"layers.{layer}."), note="no cfg")
    told = refusal(WeightsError, place, path, **{**ALL_FOUR, "num_layers": "3"})
    assert told == f"tensor {TRUNK}layers.{layer}.self_attn.q_proj.weight and 15 more missing"


def test_a_missing_last_layer_is_refused(
    place: Place, save: Save, state: State, archive: dict[str, Any]
) -> None:
    told = refusal(WeightsError, place, save(cut(state, "layers.1."), cfg=archive["cfg"]))
    assert told == "num_layers is 2 by checkpoint metadata, 1 by tensor shapes"


@pytest.mark.parametrize("name", ["layers.1.fc1.bias", "emb_layer_norm_after.weight"])
def test_a_missing_tensor_is_refused_by_name(
    place: Place, save: Save, state: State, name: str
) -> None:
    told = refusal(WeightsError, place, save(cut(state, TRUNK + name)))
    assert told == f"tensor {TRUNK}{name} missing"


@pytest.mark.parametrize(
    "name",
    [
        f"{TRUNK}layers.0.self_attn.q_proj.lora_A",
        f"{TRUNK}layers.1.self_attn.bias_k",
        f"{TRUNK}emb_layer_norm_before.weight",
        "encoder.adapter.weight",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(
    place: Place, save: Save, state: State, archive: dict[str, Any], name: str
) -> None:
    """As fair-esm does; before, it was ignored."""
    state[name] = torch.ones(2)
    told = refusal(WeightsError, place, save(state, cfg=archive["cfg"]))
    assert told == f"tensor {name} not part of an ESM-2 model"


def test_two_tensors_of_one_name_are_refused(
    place: Place, save: Save, state: State, archive: dict[str, Any]
) -> None:
    """Before, the second one counted."""
    state["encoder.layers.0.fc1.bias"] = torch.ones(256)
    told = refusal(WeightsError, place, save(state, cfg=archive["cfg"]))
    name = "layers.0.fc1.bias"
    assert told == f"two tensors are {name}: {TRUNK}{name} and encoder.{name}"


def test_missing_token_embedding_or_layers_are_refused(
    place: Place, save: Save, state: State
) -> None:
    told = refusal(WeightsError, place, save(cut(state, "embed_tokens")))
    assert told == f"no tensor {TRUNK}embed_tokens.weight: not an ESM-2 model"
    told = refusal(WeightsError, place, save(cut(state, "layers.")))
    assert told == "no tensors layers.N.*: not an ESM-2 model"


def test_a_tensor_of_another_shape_is_refused(place: Place, save: Save, state: State) -> None:
    state[f"{TRUNK}layers.1.fc1.weight"] = torch.ones(64, 256)
    told = refusal(WeightsError, place, save(state))
    fact = "layers.1.fc1.weight has shape (64, 256), an ESM-2 of hidden_dim 64 has (256, 64)"
    assert told == f"tensor {TRUNK}{fact}"


@pytest.mark.parametrize("shape", [(64,), (33, 0), (0, 64), (3, 3, 3)])
def test_a_token_embedding_that_is_no_matrix_is_refused(
    place: Place, save: Save, state: State, shape: tuple[int, ...]
) -> None:
    state[f"{TRUNK}embed_tokens.weight"] = torch.ones(shape)
    assert refusal(WeightsError, place, save(state)) == f"embed_tokens.weight has shape {shape}"


def test_a_token_embedding_of_another_alphabet_is_refused(
    place: Place, save: Save, state: State
) -> None:
    state[f"{TRUNK}embed_tokens.weight"] = torch.ones(35, 64)
    assert "embed_tokens.weight has shape (35, 64)" in refusal(WeightsError, place, save(state))


def test_a_layer_number_beyond_reason_is_refused(place: Place, save: Save, state: State) -> None:
    state[f"{TRUNK}layers.99999999.fc1.bias"] = torch.ones(1)
    assert refusal(WeightsError, place, save(state)) == "a tensor names layer 99999999"


# ---- Layers to keep


def test_a_layer_beyond_the_last_is_refused(script: Script) -> None:
    answer = script("detect", "--repr-layers", "40")
    assert answer.status == 2
    assert answer.error == "repr_layer 40 exceeds model depth 36"


def test_a_layer_before_the_first_is_refused(script: Script) -> None:
    answer = script("detect", "--repr-layers", "-38")
    assert answer.status == 2
    assert answer.error == "repr_layer -38 is before the first: model depth 36 ends at -37"


def test_layers_that_are_the_same_are_refused(script: Script) -> None:
    answer = script("detect", "--repr-layers", "36", "-1")
    assert answer.status == 2
    assert answer.error == "repr_layers 36 and -1 are the same layer"


def test_weights_on_disk_set_the_depth(script: Script, small_model: Path) -> None:
    answer = script("detect", "--esm-model", small_model, "--repr-layers", "3")
    assert (answer.status, answer.error) == (2, "repr_layer 3 exceeds model depth 2")


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [([0], (0,)), ([-1], (36,)), ([-37], (0,)), ([0, 18, -1], (0, 18, 36)), ([36], (36,))],
)
def test_layers_count_from_either_end(asked: list[int], chosen: tuple[int, ...]) -> None:
    assert select_layers(asked, 36) == chosen


def test_layers_of_a_released_model_are_the_catalogs_unless_said(place: Place) -> None:
    detection = found(place, "esm2_t33_650M_UR50D")
    assert (detection.repr_layers, sources(detection)["repr_layers"]) == ((33,), "catalog")
    detection = found(place, "esm2_t33_650M_UR50D", repr_layers="0 -2")
    assert (detection.repr_layers, sources(detection)["repr_layers"]) == ((0, 32), "override")


# ---- No tensor data is read


def resident_kilobytes(path: Path) -> int:
    """How much of this process's mappings of a file has been touched, by the kernel's count."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            ours = line.endswith(str(path))
        elif ours and first == "Rss:":
            resident += int(line.split()[1])
    return resident


def bytes_read() -> int:
    """What this process has asked read() for, cached or not."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_detection_reads_no_tensor_data(
    place: Place, like_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, kept = torch.load, []

    def load_and_keep(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        kept.append(load(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(torch, "load", load_and_keep)  # what is kept stays mapped
    found(place, like_8m)  # imports and caches are not what is measured
    kept.clear()
    before = bytes_read()
    found(place, like_8m)
    assert bytes_read() - before < like_8m.stat().st_size / 20
    assert kept
    assert resident_kilobytes(like_8m) == 0
    for tensor in kept[0]["model"].values():  # the measure itself sees a reader
        float(tensor.sum())
    assert resident_kilobytes(like_8m) > like_8m.stat().st_size / 1024 / 2


# ---- The other models of the family


def relative_model(arch: str, alphabet: str, cls: Callable[..., torch.nn.Module]) -> State:
    """The state dict of fair-esm's own class, small."""
    args = argparse.Namespace(
        arch=arch,
        layers=1,
        num_layers=1,
        embed_dim=16,
        ffn_embed_dim=64,
        attention_heads=2,
        max_positions=64,
        max_tokens=64,
        emb_layer_norm_before=True,
        token_dropout=True,
        final_bias=True,
        embed_positions_msa=True,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return dict(cls(args, esm.data.Alphabet.from_architecture(alphabet)).state_dict())


RELATIVES = [
    ("roberta_large", "ESM-1b", ProteinBertModel, TRUNK, "ESM-1b or ESM-1v", "embed_positions"),
    ("protein_bert_base", "ESM-1", ProteinBertModel, "decoder.", "ESM-1", "embed_out"),
    ("msa_transformer", "MSA Transformer", MSATransformer, TRUNK, "MSA Transformer", "msa_pos"),
]


@pytest.mark.parametrize(("arch", "alphabet", "cls", "prefix", "named", "marker"), RELATIVES)
def test_relatives_are_refused_by_name(
    script: Script,
    save: Save,
    arch: str,
    alphabet: str,
    cls: Callable[..., torch.nn.Module],
    prefix: str,
    named: str,
    marker: str,
) -> None:
    state = {prefix + name: value for name, value in relative_model(arch, alphabet, cls).items()}
    path = save(state, args=argparse.Namespace(arch=arch))
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    assert answer.error == f"{path}: an {named} model (arch {arch}), not ESM-2"
    answer = script("detect", "--esm-model", save(state, note="no args"))
    assert answer.status == 2
    assert answer.error.startswith(f"{path}: an {named} model (tensor ")
    assert marker in answer.error


@pytest.mark.parametrize("name", ["gvp_encoder.W_v.weight", "embed_confidence.w"])
def test_inverse_folding_is_refused_by_name(script: Script, save: Save, name: str) -> None:
    state = {f"encoder.{name}": torch.ones(2)}
    arch = "vt_medium_with_invariant_gvp"
    path = save(state, args=argparse.Namespace(arch=arch))
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    assert answer.error == f"{path}: an ESM-IF model (arch {arch}), not ESM-2"
    answer = script("detect", "--esm-model", save(state, note="no args"))
    assert answer.error == f"{path}: an ESM-IF model (tensor {name}), not ESM-2"
