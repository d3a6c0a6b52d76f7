"""The start: if this fails, a script does not start, or is slow, as only its user sees.

Processes of tests begin prepared (tests/processes.py); here is a Python that no test has prepared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.network.test_environment import OURS

# Python starts once for all tests.
pytestmark = pytest.mark.xdist_group("start")

NEED_NO_HUB = ["embed", "detect", "resume", "validate", "history", "verify"]
# Runs each script as the main module, one after the other: each would import torch again. A large
# tensor is made after the first, by the torch that this script has imported.
EVERY_HELP = """
import pathlib, runpy, sys
scripts = sys.argv[1:]
large = None
for name in scripts:
    path = pathlib.Path("scripts", name + ".py")
    sys.argv = [str(path), "--help"]
    sys.path[0] = str(path.parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        print("ended", name, end.code, "huggingface_hub" in sys.modules)
    if large is None:
        import torch
        large = torch.empty(16 << 20)
        maps = pathlib.Path("/proc/self/smaps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        flags = [line.split() for line in lines if line.startswith("VmFlags")]
        print("huge pages in", sum("hg" in words for words in flags))
"""


@pytest.fixture(scope="module")
def printed() -> str:
    """What all scripts print one after the other in one Python, embed first."""
    others = {path.stem for path in (ROOT / "scripts").glob("[!_]*.py")} - {*NEED_NO_HUB}
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP, *NEED_NO_HUB, *sorted(others)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(printed: str) -> dict[str, tuple[str, str]]:
    """Return of each script its exit status, and whether the Hub's library is imported then."""
    found = re.findall(r"^ended (\w+) (\S+) (True|False)$", printed, re.MULTILINE)
    return {name: (status, hub) for name, status, hub in found}


def test_every_script_starts_in_a_python_that_no_test_has_prepared(printed: str) -> None:
    names = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
    assert {name: status for name, (status, _) in ended(printed).items()} == dict.fromkeys(
        names, "0"
    )
    assert printed.count("usage: ") == len(names)


def test_scripts_that_need_no_hub_do_not_import_it(printed: str) -> None:
    assert [ended(printed)[name][1] for name in NEED_NO_HUB] == ["False"] * len(NEED_NO_HUB)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")
def test_embed_asks_for_huge_pages(printed: str) -> None:
    # `hg` among the flags of a mapping: proc(5) and madvise(2), MADV_HUGEPAGE.
    (mappings,) = re.findall(r"^huge pages in (\d+)$", printed, re.MULTILINE)
    assert int(mappings) >= 1
    assert printed.index("ended embed ") < printed.index("huge pages in") < printed.index("ended d")
