"""The list of weights formats: if these fail, a model is opened by the wrong class or by none.

A format whose name the snapshot does not accept could be embedded with, but never resumed.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.models.candidate import Candidate
from lib.models.formats import FORMATS, open_weights
from lib.models.untrained import make_folder
from schema.esm2_config import WEIGHTS_FORMATS
from tests import processes
from tests.conftest import Place


def test_a_snapshot_accepts_every_format_with_and_without_an_adapter() -> None:
    names = [known.format for known in FORMATS]
    assert sorted(WEIGHTS_FORMATS) == sorted([*names, *(f"{name}+lora" for name in names)])


@pytest.mark.parametrize("kind", [known.format for known in FORMATS])
def test_the_first_format_that_recognises_a_path_opens_it(
    tmp_path: Path, small_model: Path, kind: str
) -> None:
    folder = tmp_path / "folder"
    tensors = make_folder(folder, 2, 64, 4)
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tensors, bare)
    torch.save({"state_dict": load_file(tensors)}, tmp_path / "tuned.ckpt")
    path = {
        "fair-esm": small_model,
        "huggingface": folder,
        "safetensors": bare,
        "state-dict": tmp_path / "tuned.ckpt",
    }[kind]
    candidate = Candidate(path)
    assert next(known.format for known in FORMATS if known.recognises(candidate)) == kind
    weights = open_weights(path)
    assert (weights.format, weights.path, weights.unadapted) == (kind, path, weights)


def without_roots_rights() -> None:
    """Let permissions count for this process, as they do for everybody but root."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capget(2), this process
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize(
    ("locked", "told"),
    [
        ("model.pt", "{folder}/model.pt"),
        ("in/a/folder.pt", "esm_model {folder}/in/a/folder.pt"),
        ("folder", "{folder}/folder"),
        ("folder/config.json", "{folder}/folder/config.json"),
        ("folder/model.safetensors", "{folder}/folder/model.safetensors"),
    ],
)
def test_what_may_not_be_read_is_said_in_one_line(
    place: Place, small_model: Path, locked: str, told: str
) -> None:
    make_folder(place.folder / "folder", 2, 64, 4)
    path = place.folder / locked
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        shutil.copy(small_model, path)
    shut = place.folder / "in" if locked.startswith("in/") else path
    chosen = path.parent if path.parent.name == "folder" else path
    shut.chmod(0)
    answer = processes.run(
        "detect",
        *("--esm-model", chosen, "--config", place.config),
        prepare=without_roots_rights,
    )
    shut.chmod(0o755)
    assert answer.status == 2
    assert answer.error == f"{told.format(folder=place.folder)}: Permission denied"
