"""docs/architecture.md: if this fails, its picture or its rooms are not those of the code."""

from __future__ import annotations

import re

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PICTURE = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
ROOMS = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}


def test_there_is_one_picture_and_every_room_stands_in_it() -> None:
    (picture,) = PICTURE
    assert set(re.findall(r"lib/(\w+)(?!\w*\.py)\b", picture)) == ROOMS
    for file in re.findall(r"(\w+/\w+\.\w+)", picture):
        assert (ROOT / file).is_file(), file


def test_every_arrow_of_the_picture_leads_from_a_box_to_a_box() -> None:
    (picture,) = PICTURE
    boxes = set(re.findall(r"(\w+)(?=\[)", picture))
    arrows = re.findall(r"^ +(\w+)\S*.*--> (\w+)", picture, re.MULTILINE)
    assert len(arrows) > len(ROOMS)
    assert {end for arrow in arrows for end in arrow} == boxes


def test_every_module_has_its_line() -> None:
    modules = PAGE.split("## Every module")[1]
    for path in (ROOT / "lib").rglob("*.py"):
        assert path.name == "__init__.py" or f"| `{path.name}` | " in modules, path
    # Its whole first sentence: "al." does not end one.
    assert "| `rotary.py` | Rotary positions (Su et al. 2021): " in modules
