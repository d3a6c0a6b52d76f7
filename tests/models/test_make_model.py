"""make_model: if this fails, nobody can try the program without a download."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from tests.conftest import Place, Script
from tests.reference import Reference


def test_writes_a_model_and_its_contact_regression_that_fair_esm_reads(
    script: Script, place: Place
) -> None:
    path = place.folder / "new" / "esm2_made.pt"
    shape = ["--num-layers", "2", "--hidden-dim", "32", "--attention-heads", "2"]
    answer = script("make_model", "--to", path, *shape, "--json")
    assert answer.status == 0, answer.err
    assert answer.json["untrained"] is True
    assert Path(answer.json["regression"]).is_file()
    assert Reference(path).tokens("MKLV", [2])[2].shape == (6, 32)


def test_like_takes_the_shape_of_a_release_and_dtype_its_type(script: Script, place: Place) -> None:
    path = place.folder / "esm2_made.pt"
    answer = script(
        "make_model", "--to", path, "--like", "esm2_t6_8M_UR50D", "--num-layers", "1",
        "--dtype", "float16", "--seed", "3",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    shown = script("detect", "--esm-model", path, "--json").json["properties"]
    assert (shown["num_layers"]["value"], shown["hidden_dim"]["value"]) == (1, 320)
    assert (shown["attention_heads"]["value"], shown["dtype"]["value"]) == (20, "float16")


@pytest.mark.parametrize(
    "shape", [(0, 64, 4), (2, 63, 4), (2, 64, 64), (2, -64, 4), (2, 64, 0), (10**20, 64, 4)]
)
def test_a_shape_that_no_esm2_can_have_is_refused(
    script: Script, place: Place, shape: tuple[int, int, int]
) -> None:
    layers, width, heads = map(str, shape)
    answer = script(
        "make_model", "--to", place.folder / "esm2.pt", f"--num-layers={layers}",
        f"--hidden-dim={width}", f"--attention-heads={heads}",
    )  # fmt: skip
    assert answer.status == 2
    assert answer.error.startswith(f"{layers} layers, hidden_dim {width}, {heads} heads: ")


def test_an_existing_file_is_not_overwritten(
    script: Script, place: Place, small_model: Path
) -> None:
    before = small_model.read_bytes()
    answer = script("make_model", "--to", small_model, "--like", "esm2_t6_8M_UR50D")
    assert answer.status == 2
    assert answer.error == f"{small_model}: exists already"
    assert small_model.read_bytes() == before


def test_what_an_interruption_between_the_two_files_left_is_taken(
    script: Script, place: Place
) -> None:
    path = place.folder / "esm2_made.pt"
    flags = ["--to", path, "--num-layers", "1", "--hidden-dim", "32", "--attention-heads", "2"]
    regression = Path(script("make_model", *flags, "--json").json["regression"])
    whole = path.read_bytes()
    path.unlink()
    assert script("make_model", *flags, "--seed", "1").error == f"{regression}: exists already"
    assert not path.exists()
    assert script("make_model", *flags).status == 0
    assert path.read_bytes() == whole


def test_a_full_disk_is_one_line_and_leaves_nothing(
    script: Script, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(_content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 1\nframe #0")

    monkeypatch.setattr(torch, "save", save)
    path = place.folder / "esm2.pt"
    answer = script("make_model", "--to", path, "--like", "esm2_t6_8M_UR50D", "--num-layers", "1")
    assert answer.status == 4
    assert answer.error.startswith(f"{path}: [enforce fail")
    assert [one.name for one in place.folder.iterdir()] == ["config.ini"]


def test_a_target_without_a_name_is_refused(
    script: Script, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    shape = ["--num-layers", "2", "--hidden-dim", "32", "--attention-heads", "2"]
    for to in (".", "", "/"):
        answer = script("make_model", "--to", to, *shape)
        assert (answer.status, answer.error) == (2, f"{Path(to)}: exists already")
