"""Ownership without locks: if these fail, two processes write one run, or overwrite each other.

On a share whose locks reach one host only, a run can have two owners. The newest attempt keeps it.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.reference import assert_same_bits

QUICK = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=900"]
# Before the second commit; and within it, when its file is about to get its name.
MOMENTS = ["lib.ledger.commit.add_checkpoint", "lib.jobs.stretches.CheckpointWriter.finish"]


@pytest.mark.parametrize("moment", MOMENTS, ids=["commit", "file"])
def test_an_owner_that_has_lost_its_run_commits_nothing_more(
    script: Script, place: Place, small_model: Path, moment: str
) -> None:
    gate = place.folder / "gate"
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, *QUICK]
    paused = partial(processes.stop_at, moment, 2, gate)
    with processes.start("embed", *flags, "--config", place.config, prepare=paused) as first:
        first.wait_for("reached")
        (place.output / "run-000001" / ".lock").unlink()
        assert script("resume", "--run", "1").status == 0
        listed = files_of(place)
        gate.touch()
        lost = first.end()
    assert lost.status == 4
    assert lost.error == "run 1: attempt 1 has lost it to attempt 2"
    assert files_of(place) == listed
    detail = script("history", "--run", "1", "--json").json
    assert detail["status"] == "finished"
    assert [one["outcome"] for one in detail["attempts"]] == ["lost", "finished"]
    assert script("validate", "--run", "1").status == 0
    assert script("embed", *flags).status == 0
    assert_same_bits(place.output / "run-000001", place.output / "run-000002")


def test_a_file_that_another_has_put_in_the_place_of_ours_is_not_committed(
    script: Script, place: Place, small_model: Path
) -> None:
    gate = place.folder / "gate"
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, *QUICK]
    paused = partial(processes.stop_at, MOMENTS[0], 2, gate)
    with processes.start("embed", *flags, "--config", place.config, prepare=paused) as owner:
        owner.wait_for("reached")
        (ours,) = (place.output / "run-000001").glob(".attempt-1-*")
        other = place.folder / "other"
        other.write_bytes(b"4444")
        other.rename(ours)
        gate.touch()
        refused = owner.end()
    assert refused.status == 4
    assert refused.error == f"{ours}: another file has taken its place"
    assert len(script("history", "--run", "1", "--json").json["checkpoints"]) == 1
    assert script("resume").status == 0
    assert script("validate", "--run", "1").status == 0


def files_of(place: Place) -> dict[str, str]:
    """Return the digests of what the database lists, as the files have them."""
    with closing(sqlite3.connect(place.database)) as connection:
        rows = connection.execute(
            "SELECT path, sha256 FROM checkpoints WHERE run_id = 1"
        ).fetchall()
    for name, digest in rows:
        content = (place.output / "run-000001" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
    return dict(rows)
