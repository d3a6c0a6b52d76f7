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
from tests.conftest import Place, Script
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
    assert "untrained weights" in answer.err
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


def test_another_epsilon_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    assert refusal(folder) == "layer_norm_eps 1e-12: ESM-2 has 1e-05"


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
