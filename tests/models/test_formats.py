"""The list of weights formats: if these fail, a model is opened by the wrong class or by none.

A format whose name the snapshot does not accept could be embedded with, but never resumed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.models.formats import FORMATS, open_weights
from lib.models.untrained import make_folder
from schema.esm2_config import WEIGHTS_FORMATS


def test_a_snapshot_accepts_every_format_with_and_without_an_adapter() -> None:
    names = [known.format for known in FORMATS]
    assert sorted(WEIGHTS_FORMATS) == sorted([*names, *(f"{name}+lora" for name in names)])


@pytest.mark.parametrize("kind", ["fair-esm", "huggingface"])
def test_exactly_one_format_recognises_a_path(tmp_path: Path, small_model: Path, kind: str) -> None:
    path = small_model if kind == "fair-esm" else tmp_path / "folder"
    if kind == "huggingface":
        make_folder(path, 2, 64, 4)
    assert [known.format for known in FORMATS if known.recognises(path)] == [kind]
    weights = open_weights(path)
    assert (weights.format, weights.path, weights.unadapted) == (kind, path, weights)
