"""Hugging Face folders as transformers writes them: .bin files, task heads, its own numbers.

If these fail, a fine-tune that a lab made with transformers gives other vectors here than there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.models.formats import open_weights
from lib.models.tensor_names import fair_esm_name, hugging_face_name
from lib.models.untrained import make_folder, make_model
from lib.sequences.alphabet import tokenise
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.models.test_weights import SEQUENCE, found, hidden, load, refusal
from tests.reference import worst_residue_error

SHAPE = ["--num-layers", "2", "--hidden-dim", "64", "--attention-heads", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """small_model as a Hugging Face folder, by make_folder."""
    make_folder(tmp_path / "hf", 2, 64, 4)
    return tmp_path / "hf"


def as_bin(folder: Path, state: Mapping[str, object], shards: int = 1) -> Path:
    """Replace the weights of a folder by .bin files, with an index if there are several."""
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"pytorch_model-0000{i + 1}-of-0000{shards}.bin"
        part = dict(list(state.items())[i::shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same_vectors(one: Path, other: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(hidden(one), hidden(other), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_make_model_writes_the_tensors_of_the_pt_file(
    script: Script, place: Place, dtype: str
) -> None:
    path, folder = place.folder / "made.pt", place.folder / "made"
    flags = [*SHAPE, "--seed", "5", "--dtype", dtype]
    assert script("make_model", "--to", path, *flags).status == 0
    answer = script("make_model", "--format", "huggingface", "--to", folder, *flags, "--json")
    assert answer.status == 0, answer.err
    assert answer.json["untrained"] is True
    assert answer.json["weights"] == str(folder)
    theirs = load_file(folder / "model.safetensors")
    state = load(path)["model"] | load(Path(script_regression(path)))["model"]
    state.pop("encoder.lm_head.weight")  # tied to the embedding, and not stored twice
    ours = {
        name.removeprefix("encoder.").removeprefix("sentence_encoder."): tensor
        for name, tensor in state.items()
    }
    assert sorted(map(fair_esm_name, theirs)) == sorted(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[fair_esm_name(name)]), name
        assert hugging_face_name(fair_esm_name(name)) == name
    assert open_weights(folder).untrained
    assert same_vectors(folder, path)


def script_regression(path: Path) -> str:
    return str(path.with_name(f"{path.stem}-contact-regression.pt"))


def test_an_existing_folder_is_not_written_to(script: Script, folder: Path) -> None:
    answer = script("make_model", "--format", "huggingface", "--to", folder, *SHAPE)
    assert (answer.status, answer.error) == (2, f"{folder}: exists already")


def test_a_folder_that_cannot_be_made_is_one_line(script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = script("make_model", "--format", "huggingface", "--to", tmp_path / "file/hf", *SHAPE)
    assert answer.status == 4
    assert answer.error == f"{tmp_path}/file/hf: Not a directory"


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_bin_is_the_same_model(folder: Path, small_model: Path, shards: int) -> None:
    state = load_file(folder / "model.safetensors")
    # What EsmForMaskedLM's state dict holds twice.
    embedding = state["esm.embeddings.word_embeddings.weight"]
    state["lm_head.decoder.weight"] = embedding
    as_bin(folder, state, shards)
    assert same_vectors(folder, small_model)
    names = "config.json pytorch_model*.bin"
    told = subprocess.run(
        ["sh", "-c", f"sha256sum {names} | sha256sum"],
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    assert open_weights(folder).sha256() == told.stdout.split()[0]


@pytest.mark.parametrize("bin_file", [True, False])
@pytest.mark.parametrize("prefix", ["esm.", ""])
def test_heads_are_ignored_and_not_counted(
    folder: Path, small_model: Path, prefix: str, bin_file: bool
) -> None:
    state = {
        name.replace("esm.", prefix, 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith("lm_head.")
    }
    state["classifier.dense.weight"] = torch.ones(64, 64, dtype=torch.float64)
    state["classifier.out_proj.weight"] = torch.ones(2, 64)
    if bin_file:
        as_bin(folder, state)
    else:
        save_file(state, folder / "model.safetensors")
    parameters = found(folder).properties["parameters"]
    assert parameters == found(small_model).properties["parameters"]
    assert same_vectors(folder, small_model)


def test_a_hostile_bin_is_refused_and_nothing_runs(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Call:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (marker,)

    state = load_file(folder / "model.safetensors")
    as_bin(folder, state | {"extra": Call()})
    told = refusal_of_file(folder, "pytorch_model.bin")
    assert told == "refused: its pickle asks for getattr, which is not in the allow-list"
    assert not marker.exists()


def refusal_of_file(folder: Path, name: str) -> str:
    """The line with which a file of a folder is refused, without the path."""
    with pytest.raises(Exception, match=name) as caught:
        found(folder)
    told = str(caught.value)
    assert told.startswith(f"{folder}/{name}: ")
    return told.removeprefix(f"{folder}/{name}: ")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip"])
def test_a_broken_bin_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    told = refusal_of_file(folder, "pytorch_model.bin")
    assert told == "truncated, or not a torch.save archive (no zip directory)"


def test_an_index_of_bins_names_no_other_kind(folder: Path) -> None:
    as_bin(folder, load_file(folder / "model.safetensors"), 2)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    told = refusal_of_file(folder, index.name)
    assert told == "names 'config.json', which is not a .bin file"


def test_two_tensors_of_one_name_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "encoder.emb_layer_norm_after.bias"
    save_file(state | {name: torch.zeros(64)}, folder / "model.safetensors")
    told = refusal_of_file(folder, "model.safetensors")
    assert told.startswith("two tensors are emb_layer_norm_after.bias, the second ")


# ---- config.json: what can change a vector is used, or refused with its value

ABSENT = object()


def configured(folder: Path, changes: Mapping[str, object]) -> Path:
    """Change keys of config.json; one that is ABSENT is removed."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("layer_norm_eps", 1e-12, "1e-12: ESM-2 has 1e-05"),
        ("layer_norm_eps", ABSENT, "is absent, which means 1e-12: ESM-2 has 1e-05"),
        ("layer_norm_eps", None, "None: ESM-2 has 1e-05"),
        ("layer_norm_eps", "1e-5", "'1e-5': ESM-2 has 1e-05"),
        ("is_decoder", True, "True: attention to earlier residues only, not ESM-2"),
        ("add_cross_attention", True, "True: more layers, not ESM-2"),
        ("pruned_heads", {"0": [1]}, "{'0': [1]}: fewer heads, not ESM-2"),
        (
            "quantization_config",
            {"quant_method": "gptq"},
            "{'quant_method': 'gptq'}: other numbers than the tensors hold, not ESM-2",
        ),
        (
            "per_layer_config",
            {"0": {"layer_norm_eps": 0.01}},
            "{'0': {'layer_norm_eps': 0.01}}: other layers than ESM-2 has, not ESM-2",
        ),
        (
            "transformers_weights",
            "other.safetensors",
            "'other.safetensors': a file of another name",
        ),
        (
            "mask_token_id",
            4,
            "4 with token_dropout: a token that sequences hold; ESM-2 has 32",
        ),
        (
            "mask_token_id",
            2,
            "2 with token_dropout: a token that sequences hold; ESM-2 has 32",
        ),
        ("mask_token_id", ABSENT, "None with token_dropout"),
        ("mask_token_id", True, "True with token_dropout"),
    ],
)
def test_a_key_that_changes_vectors_is_refused_with_its_value(
    folder: Path, key: str, value: object, fact: str
) -> None:
    """Before, only layer_norm_eps was looked at, and not where it was absent."""
    assert refusal(configured(folder, {key: value})) == f"{key} {fact}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("mask_token_id", 31),
        ("pad_token_id", 5),
        ("is_causal", False),
        ("rope_theta", 500.0),  # where frequencies are stored, they count
        ("head_dim", 8),
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("max_position_embeddings", 8),
        ("dtype", "float16"),
        ("layer_norm_eps", 0.00001),
    ],
)
def test_a_key_that_changes_nothing_changes_nothing(
    folder: Path, small_model: Path, key: str, value: object
) -> None:
    assert same_vectors(configured(folder, {key: value}), small_model)
    assert "unknown_keys" not in found(folder).properties


def test_without_a_word_of_token_dropout_there_is_none(folder: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "without", 2, 64, 4, token_dropout=False)
    absent = {"token_dropout": ABSENT, "mask_token_id": ABSENT}
    assert same_vectors(configured(folder, absent), tmp_path / "without")


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("rope_theta", 500.0, "500.0 without a tensor inv_freq: ESM-2 has 10000"),
        ("rope_theta", None, "None without a tensor inv_freq: ESM-2 has 10000"),
        (
            "head_dim",
            8,
            "8 without a tensor inv_freq: ESM-2 has hidden_size / num_attention_heads",
        ),
        (
            "head_dim",
            "16",
            "'16' without a tensor inv_freq: ESM-2 has hidden_size / num_attention_heads",
        ),
    ],
)
def test_frequencies_that_no_tensor_holds_are_those_of_esm2(
    folder: Path, small_model: Path, key: str, value: object, fact: str
) -> None:
    """Before, these keys were ignored."""
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
    save_file(kept, folder / "model.safetensors")
    assert same_vectors(configured(folder, {"head_dim": 16, "rope_theta": 10000}), small_model)
    assert refusal(configured(folder, {key: value})) == f"{key} {fact}"


def test_unknown_keys_are_named_once_and_the_digest_covers_them(
    script: Script, folder: Path
) -> None:
    """Before, nothing was said of them."""
    before = open_weights(folder).sha256()
    configured(folder, {"rope_style": "spiral", "attention_sinks": None})
    rows = script("detect", "--esm-model", folder).out.splitlines()
    assert [row.split() for row in rows if "rope_style" in row] == [
        ["unknown_keys", "attention_sinks", "rope_style", "config.json"]
    ]
    answer = script("embed", "--esm-model", folder, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    assert answer.err.count("rope_style") == 1
    assert open_weights(folder).sha256() != before


# ---- Tensors: used, known to lie beside the trunk, or refused by name


def with_tensors(folder: Path, added: Mapping[str, torch.Tensor], removed: str = "\0") -> Path:
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if removed not in name}
    save_file(kept | dict(added), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "esm.encoder.layer.0.attention.self.query.lora_A.weight",
        "esm.encoder.layer.1.attention.self.distance_embedding.weight",
        "esm.embeddings.layer_norm.weight",
        "esm.adapter.weight",
        "encoder.layer.0.adapter.weight",
        "esm.encoder.layer.0.output.dense.weight_scale",
    ],
)
def test_an_unknown_tensor_of_the_trunk_is_refused_by_name(folder: Path, name: str) -> None:
    """Before, it was ignored."""
    told = refusal(with_tensors(folder, {name: torch.ones(2)}))
    assert told == f"tensor {name} not part of an ESM-2 model"


def test_types_that_esm2_does_not_have_are_refused_by_name(folder: Path) -> None:
    name = "esm.encoder.layer.1.output.dense.bias"
    told = refusal(with_tensors(folder, {name: torch.ones(64, dtype=torch.float64)}))
    assert told == f"tensors of several types: float32, float64: {name} of type float64"


def test_tables_and_heads_beside_the_trunk_change_nothing(folder: Path, small_model: Path) -> None:
    beside = (
        "esm.embeddings.position_ids",
        "esm.embeddings.position_embeddings.weight",
        "esm.pooler.dense.weight",
        "classifier.weight",
        "qa_outputs.bias",
        "my_own_head.0.weight",
    )
    tensors = {name: torch.ones(2, dtype=torch.int64) for name in beside}
    assert same_vectors(with_tensors(folder, tensors), small_model)


FREQUENCIES = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"


def test_frequencies_of_all_layers_and_of_one_are_refused(folder: Path) -> None:
    """Before, those of all layers were ignored."""
    told = refusal(with_tensors(folder, {"esm.rotary_embeddings.inv_freq": torch.ones(8)}))
    names = f"esm.rotary_embeddings.inv_freq and {FREQUENCIES.format(0)}"
    assert told == f"two tensors are rotary frequencies: {names}"


def test_frequencies_of_some_layers_are_refused(folder: Path) -> None:
    """Before, those of one layer stood for all; versions of transformers differ in this."""
    told = refusal(with_tensors(folder, {}, removed=FREQUENCIES.format(0)))
    assert told == "1 of 2 layers have a tensor rot_emb.inv_freq"


@pytest.mark.xdist_group("transformers")  # imported by one process
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["EsmModel", "EsmForMaskedLM", "EsmForSequenceClassification"])
def test_every_layer_is_that_of_transformers(tmp_path: Path, folder: Path, kind: str) -> None:
    import transformers

    saved = tmp_path / "saved"
    loaded = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    loaded.save_pretrained(saved)
    trunk = loaded if kind == "EsmModel" else loaded.esm
    tokens = torch.from_numpy(tokenise([SEQUENCE])).long()[None]
    with torch.inference_mode():
        answer = trunk(tokens, torch.ones_like(tokens), output_hidden_states=True)
    theirs = [layer[0] for layer in answer.hidden_states[:-1]] + [answer.last_hidden_state[0]]
    for path in (folder, saved):
        for ours, layer in zip(hidden(path), theirs, strict=True):
            assert worst_residue_error(ours.numpy(), layer.numpy()) < 1e-5


def test_the_same_seed_is_small_model(folder: Path, small_model: Path, tmp_path: Path) -> None:
    assert same_vectors(folder, small_model)
    make_model(tmp_path / "seven.pt", 2, 64, 4, seed=7)
    assert not same_vectors(folder, tmp_path / "seven.pt")
