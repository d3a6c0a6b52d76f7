"""Folders that real versions of transformers and PEFT saved give the vectors of those versions.

If these fail, a lab's model is refused or, worse, embedded otherwise than where it was trained.
How the folders were made: tests/data/saved_by_transformers/README.md and make.py. Nothing in them
was trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import WeightsError
from lib.models.detection import detect
from lib.network.esm2 import load_network
from lib.sequences.alphabet import tokenise
from lib.settings import load_settings
from tests.conftest import DATA
from tests.reference import Array, worst_residue_error

SAVED = DATA / "saved_by_transformers"
# Stored hidden states are of these, or of the first three.
SEQUENCES = [
    b"M",
    b"MKTAYIAKQ",
    b"GSHMLEDPVRXQWACNTFIYKBUZ",
    b"MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALY",
]
NEWEST = "5.24.0"
FOLDERS = sorted(str(path.parent.relative_to(SAVED)) for path in SAVED.glob("[45].*/*/config.json"))
ADAPTERS = sorted(path.parent.name for path in SAVED.glob("adapters/*/adapter_config.json"))
MERGED = sorted(path.parent.name for path in SAVED.glob("adapters/*/config.json"))
VARIANTS = json.loads((SAVED / "variants" / "variants.json").read_text())
# transformers has no use for these keys.
WITHOUT_EFFECT = ("hidden_act_relu", "pad_token_id_5")
PLAIN = SAVED / "4.57.6" / "EsmModel-single"
STATES_OF = {"EsmModel-float16": "float16.npz", "EsmModel-rope-theta-500": "rope_theta_500.npz"}


def stored(path: Path) -> Array:
    """Return (layers + 1, tokens, width): the hidden states of a file, sequences end to end."""
    with np.load(path) as file:
        return np.concatenate([file[f"arr_{i}"] for i in range(len(file.files))], axis=1)


def hidden(path: Path, sequences: list[bytes], base: Path | None = None) -> Array:
    """Return what this project computes, in the shape of `stored`."""
    overrides = {"model.esm_model": str(path)}
    if base is not None:
        overrides["model.base_model"] = str(base)
    detection = detect(load_settings(overrides=overrides).model)
    network = load_network(detection, torch.device("cpu"), torch.float32)
    tokens = torch.from_numpy(tokenise(sequences))
    layers = range(detection.shape.num_layers + 1)
    lengths = [len(sequence) for sequence in sequences]
    return np.stack([x.clone().numpy() for _, x in network.forward(tokens, lengths, layers)])


def assert_same(path: Path, file: Path, base: Path | None = None) -> None:
    """Compare a folder's vectors with hidden states: each residue of each layer within 1e-5."""
    theirs = stored(file)
    few = [] if theirs.shape[1] == sum(len(one) + 2 for one in SEQUENCES) else SEQUENCES[3:]
    ours = hidden(path, SEQUENCES[: len(SEQUENCES) - len(few)], base)
    for layer, truth in zip(ours, theirs, strict=True):
        zero = ~truth.any(axis=-1)  # embeddings of what config.json calls the mask
        assert not layer[zero].any()
        assert worst_residue_error(layer[~zero], truth[~zero]) < 1e-5


def folder_of(
    folder: Path, config: dict[str, object], state: dict[str, torch.Tensor] | None = None
) -> Path:
    """Copy the plain folder with changes to config.json, and with other tensors if they are given.

    A key is removed where the change is "(absent)".
    """
    shutil.copytree(PLAIN, folder)
    changed = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in changed.items() if value != "(absent)"}
    (folder / "config.json").write_text(json.dumps(kept))
    if state is not None:
        save_file(state, folder / "model.safetensors")
    return folder


def plain_state() -> dict[str, torch.Tensor]:
    return load_file(PLAIN / "model.safetensors")


def variant_folder(folder: Path, name: str) -> Path:
    """Make the folder of which variants/VERSION/NAME.npz holds the hidden states."""
    variant = VARIANTS[name]
    added = {key: torch.tensor(value) for key, value in variant["tensors"].items()}
    state = {f"esm.{key}": tensor for key, tensor in plain_state().items()} | added
    return folder_of(
        folder, variant["config"], {k: v for k, v in state.items() if k not in variant["removed"]}
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_has_the_vectors_of_the_version_that_saved_it(name: str) -> None:
    folder = SAVED / name
    assert_same(folder, folder.parent / STATES_OF.get(folder.name, "hidden_states.npz"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_read_as_transformers_reads_it_or_refused(tmp_path: Path, name: str) -> None:
    folder = variant_folder(tmp_path / "variant", name)
    try:
        assert_same(folder, SAVED / "variants" / NEWEST / f"{name}.npz")
    except WeightsError as error:
        assert name not in WITHOUT_EFFECT
        told = str(error)
        assert len(told.splitlines()) == 1
        named = [*VARIANTS[name]["config"], "inv_freq", "rotary"]
        assert any(key in told for key in named), told


FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def write_weights(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Write weights as the file `name` says: whole, or one shard and its index."""
    whole = Path(name.removesuffix(".index.json"))
    if whole.name != name:
        whole = Path(f"{whole.stem}-00001-of-00001{whole.suffix}")
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, whole.name)}
        (folder / name).write_text(json.dumps(index))
    if whole.suffix == ".bin":
        torch.save(state, folder / whole)
    else:
        save_file(state, folder / whole)


@pytest.mark.parametrize(
    ("read", "ignored"), [(one, other) for i, one in enumerate(FILES) for other in FILES[i + 1 :]]
)
def test_of_two_files_the_one_that_transformers_reads_is_read(
    tmp_path: Path, read: str, ignored: str
) -> None:
    evidence = json.loads((SAVED / "evidence" / f"{NEWEST}.json").read_text())
    assert evidence["reads"][f"{read} and {ignored}"] == read
    folder = folder_of(tmp_path / "both", {})
    (folder / "model.safetensors").unlink()
    state = plain_state()
    write_weights(folder, read, state)
    write_weights(folder, ignored, {name: tensor + 1 for name, tensor in state.items()})
    assert_same(folder, PLAIN.parent / "hidden_states.npz")


def test_a_missing_tensor_is_named_as_the_file_would_name_it(tmp_path: Path) -> None:
    folder = tmp_path / "incomplete"
    shutil.copytree(SAVED / "5.23.0" / "EsmModel-single", folder)
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.LayerNorm.gamma"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\.LayerNorm\.gamma"):
        hidden(folder, SEQUENCES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_vectors_of_peft(name: str) -> None:
    folder = SAVED / "adapters" / name
    base = SAVED / "adapters" / "base_fair_esm.pt" if name.startswith("fair_esm") else None
    assert_same(folder, folder / "hidden_states.npz", base)


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_adapter_has_the_vectors_of_peft(name: str) -> None:
    folder = SAVED / "adapters" / name
    unmerged = folder.with_name(name.removesuffix("_merged"))
    assert_same(folder, unmerged / "hidden_states.npz")
