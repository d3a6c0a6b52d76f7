"""docs/sharing.md: if this fails, what people copy from it does not read what they were handed.

The page's ```console and ```python blocks run as printed, in one fresh copy of the project.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_program
from tests.interpreter import clone
from tests.test_docs import matches, run_in_shell, steps

# The programs read what the commands wrote.
pytestmark = pytest.mark.xdist_group("sharing")
PAGE = (ROOT / "docs" / "sharing.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quick_python: Path) -> Path:
    """A copy of the project in which every command of the page has run."""
    path = tmp_path_factory.mktemp("sharing")
    clone(path, quick_python)
    done = run_in_shell([step.command for step in steps(PAGE)], path)
    for step, (printed, _) in zip(steps(PAGE), done, strict=True):
        assert matches(step.printed, printed), f"$ {step.command}\n{printed}"
    return path


def test_the_dataset_is_read_as_printed(folder: Path) -> None:
    (program,) = PROGRAMS
    assert run_program(folder, program) == "117 (3, 128)\n"
