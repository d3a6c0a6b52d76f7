"""Ownership without locks: if these fail, two processes write one run, or overwrite each other.

On a share whose locks reach one host only, a run can have two owners. The newest attempt keeps it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import socket
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from lib.ledger.ownership import LOCK_NAME, HeldError, is_held, take_lock
from tests import processes
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.reference import assert_same_bits

QUICK = ["--set", "output.checkpoint_records=3", "--set", "compute.tokens_per_pack=300"]
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
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


def on_host(name: str, then: processes.Work | None = None) -> None:
    """Move this process to a host of its own: other network and name, the same files."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(name)
    if then is not None:
        then()


@pytest.mark.parametrize("locks_reach", [True, False], ids=["locks", "no locks"])
def test_two_hosts_that_share_a_folder(
    script: Script, place: Place, small_model: Path, locks_reach: bool
) -> None:
    if processes.run_function(partial(on_host, "trial")).status != 0:
        pytest.skip("this process may not make namespaces")
    gate = place.folder / "gate"
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS, *QUICK]
    first = partial(on_host, "host-a", partial(processes.stop_at, MOMENTS[0], 2, gate))
    with processes.start("embed", *flags, "--config", place.config, prepare=first) as there:
        there.wait_for("reached")
        owner = f"process {there.pid} on host-a"
        if not locks_reach:  # as on a share where each host has locks of its own
            (place.output / "run-000001" / ".lock").unlink()
        here = processes.run("resume", "--config", place.config, prepare=partial(on_host, "host-b"))
        gate.touch()
        ended = there.end()
    if locks_reach:
        assert here.status == 4
        assert here.error.startswith(f"run 1: owned by {owner} since ")
        assert ended.status == 0
    else:
        assert here.status == 0, here.err
        assert ended.error == "run 1: attempt 1 has lost it to attempt 2"
    hosts = [one["host"] for one in script("history", "--run", "1", "--json").json["attempts"]]
    assert hosts == (["host-a"] if locks_reach else ["host-a", "host-b"])
    assert script("validate", "--run", "1").status == 0


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


def test_a_look_at_the_lock_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, who took it within the moment of a look was told that a process owns the run."""
    take_lock(tmp_path).close()
    looking = (tmp_path / LOCK_NAME).open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("lib.ledger.ownership.time.sleep", lambda _: looking.close())
    with take_lock(tmp_path):
        assert looking.closed
        assert is_held(tmp_path)
        monkeypatch.undo()
        with pytest.raises(HeldError):
            take_lock(tmp_path)
    assert is_held(tmp_path) is False


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
