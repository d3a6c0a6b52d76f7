"""The process that computes: if this fails, it is slow, grows, or a user's notebook is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT

OURS = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PROGRAM = """
import json, os, sys
before = dict(os.environ)
{}
print(json.dumps(dict(
    changed=dict(set(os.environ.items()) ^ set(before.items())), modules=[*sys.modules]
)))
"""


def after(statement: str, **environment: str) -> Any:  # noqa: ANN401 (JSON)
    """Return what a statement changes in the environment of a fresh process, and its modules."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement)],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_reading_vectors_changes_nothing_in_a_notebook() -> None:
    answer = after("from lib.embeddings import open_run")
    assert answer["changed"] == {}
    assert not {"torch", "sqlalchemy.orm"}.intersection(answer["modules"])


def test_the_network_sets_its_environment_before_torch_is_loaded() -> None:
    answer = after("import lib.network")
    assert sorted(answer["changed"]) == sorted(OURS)
    assert "torch" not in answer["modules"]


def test_what_the_user_has_set_stays() -> None:
    answer = after("import lib.network", LRU_CACHE_CAPACITY="7")
    assert sorted(answer["changed"]) == sorted(OURS[:2])
