"""Locked: another program holds the run database for ever, with the time-out as users have it.

Once from before a script starts, once from a run's first checkpoint on; both at the same time, as
each waits for a minute or two.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from lib.ledger.sqlite_file import BUSY_SECONDS
from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import finished, script, start

# Holds a write lock for so many seconds.
_HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""
# The commit waits, and after it the end of the attempt; then some time for all the rest.
_MOST_SECONDS = 2 * BUSY_SECONDS + 15


def trials(folder: Path, _rounds: int, _seed: int) -> list[Outcome]:
    """Lock two runs' databases and wait for their ends, once."""
    before, during = make_bench(folder / "before"), make_bench(folder / "during")
    during.fresh()
    kinds = {"from the start": before, "after a commit": during}
    ends = []
    with held(_database(before), 2 * _MOST_SECONDS) as one:
        since = time.monotonic()
        pids = [start(lambda: script("resume", before.resume), before.log)]
        pids.append(start(lambda: _slowly(during), during.log))
        while not _checkpoints(during) and time.monotonic() - since < BUSY_SECONDS:
            time.sleep(0.05)
        with held(_database(during), 2 * _MOST_SECONDS) as other:
            committed = _checkpoints(during)
            for bench, pid in zip(kinds.values(), pids, strict=True):
                status, taken = finished(pid), time.monotonic() - since
                ends.append((status, f"after {taken:.0f} s: {_said(bench)}"))
            other.kill()
        one.kill()
    losses = [before.lost(), "a row" if _checkpoints(during) != committed else during.to_the_end()]
    return [
        Outcome(
            f"database locked for ever, {when}", 1, said, lost or _wrong(status, said) or "nothing"
        )
        for when, (status, said), lost in zip(kinds, ends, losses, strict=True)
    ]


def held(database: Path, seconds: float) -> subprocess.Popen[str]:
    """Hold a database's write lock for so many seconds, or until the process is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(database), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def _wrong(status: int, said: str) -> str:
    told = said.endswith(": error: database runs.sqlite: database is locked")
    return "" if status == 4 and told else f"ended with {status}"


def _said(bench: Bench) -> str:
    return bench.said().replace(f"{bench.trial}/", "")


def _database(bench: Bench) -> Path:
    return bench.trial / "runs.sqlite"


def _slowly(bench: Bench) -> int:
    pipeline: Any = import_module("lib.network.pipeline")
    true = pipeline.launch

    def launch(*arguments: object) -> object:
        time.sleep(1)
        return true(*arguments)

    pipeline.launch = launch
    return script("embed", bench.embed)


def _checkpoints(bench: Bench) -> list[object]:
    if not _database(bench).exists():
        return []
    with closing(sqlite3.connect(_database(bench))) as connection:
        try:
            return connection.execute("SELECT path, sha256 FROM checkpoints").fetchall()
        except sqlite3.OperationalError:  # not made yet
            return []
