"""Owners: a database restored from an older copy, runs without locks, weights that are swapped.

At random times: a copy of the database is put back over a later one, a second process takes a run
over whose lock file has gone, and other weights of the same shape take the place of those in use.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lib.models.untrained import make_model
from tests.reference import assert_same_bits
from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import finished, in_fork, killed_after, script, start


@dataclass
class _Kind:
    what: str
    trials: int = 0
    found: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def outcome(self) -> Outcome:
        happened = ", ".join(f"{count} {what}" for what, count in sorted(self.found.items()))
        return Outcome(self.what, self.trials, happened, "; ".join(self.lost) or "nothing")


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Try each kind once in each round."""
    bench = make_bench(folder / "owners")
    swaps = _Swaps(bench)
    chance = random.Random(seed)
    kinds = [
        (_restored, _Kind("run database restored from an older copy")),
        (_two_owners, _Kind("two processes on one run, the lock file gone")),
        (swaps.trial, _Kind("weights swapped for others of the same shape, mid-start")),
    ]
    since = time.monotonic()
    bench.fresh()
    in_fork(lambda: script("embed", bench.embed), bench.log)
    seconds = time.monotonic() - since
    for _ in range(rounds):
        for trial, kind in kinds:
            kind.trials += 1
            wrong = trial(bench, chance, seconds, kind.found)
            if wrong:
                kind.lost.append(f"trial {kind.trials}: {wrong}")
    return [kind.outcome() for _, kind in kinds]


def _restored(bench: Bench, chance: random.Random, seconds: float, found: Counter[str]) -> str:
    """Kill a run, copy its database, go on, kill it again or not, put the copy back, go on."""
    copy = bench.folder / "copy.sqlite"
    bench.fresh()
    _killed("embed", bench.embed, bench, chance.uniform(0.3, 1) * seconds)
    if not bench.is_recorded():
        found["not begun"] += 1
        return ""
    shutil.copy(bench.trial / "runs.sqlite", copy)
    _killed("resume", bench.resume, bench, chance.uniform(0.3, 1.5) * seconds)
    for path in bench.trial.glob("runs.sqlite*"):
        path.unlink()
    shutil.copy(copy, bench.trial / "runs.sqlite")
    in_fork(lambda: script("resume", bench.resume), bench.log)
    text = bench.log.read_text(errors="replace")
    found["files adopted"] += text.count("verified and adopted")
    # Without a lock that reaches every host, somebody may be writing it.
    alone = ": of an attempt that the database does not know, left alone"
    for name in re.findall(rf"run \d+: (\S+){alone}", text):
        (bench.run / name).unlink()
        found["unfinished files left alone"] += 1
    found["restored"] += 1
    return bench.to_the_end()


def _two_owners(bench: Bench, chance: random.Random, seconds: float, found: Counter[str]) -> str:
    """Take the lock away from a live process, and resume its run beside it."""
    bench.fresh()
    first = start(lambda: script("embed", bench.embed), bench.log)
    time.sleep(chance.uniform(0.2, 1) * seconds)
    (bench.run / ".lock").unlink(missing_ok=True)
    other = bench.folder / "log of the second"
    second = start(lambda: script("resume", bench.resume), other)
    statuses = finished(first), finished(second)
    text = bench.log.read_text(errors="replace") + other.read_text(errors="replace")
    found["owners that had lost their run"] += text.count("has lost it to attempt")
    if "Traceback" in text:
        return f"statuses {statuses}: a traceback"
    return bench.to_the_end()


class _Swaps:
    """Other weights of the same shape, and the run that they would make."""

    def __init__(self, bench: Bench) -> None:
        self._weights = bench.folder / "esm2_small.pt"
        self._own = bench.folder / "own.pt"
        self._other = bench.folder / "other.pt"
        shutil.copy(self._weights, self._own)
        make_model(self._other, 2, 64, 4, seed=1)
        self._references = {}
        for name, path in (("own", self._own), ("other", self._other)):
            self._put(path)
            bench.fresh()
            in_fork(lambda: script("embed", bench.embed), bench.log)
            self._references[_digest_on_record(bench)] = bench.folder / f"run of {name}"
            shutil.copytree(bench.run, bench.folder / f"run of {name}")
        self._put(self._own)

    def trial(
        self, bench: Bench, chance: random.Random, seconds: float, found: Counter[str]
    ) -> str:
        """Swap the weights at a random time, half of the times with a turned link, and back."""
        bench.fresh()
        pid = start(lambda: script("embed", bench.embed), bench.log)
        time.sleep(chance.uniform(0, 1) * seconds)
        self._put(self._other, link=chance.random() < 0.5)
        time.sleep(chance.uniform(0, 0.1))
        self._put(self._own)
        status = finished(pid)
        found["refused" if status else "ended good"] += 1
        if status:
            said = bench.said()
            return "" if status == 2 and "changed while" in said else f"status {status}: {said}"
        whole = self._references[_digest_on_record(bench)]
        compare = partial(_compared, bench.run, whole)
        return "" if in_fork(compare, bench.log) == 0 else bench.said()

    def _put(self, source: Path, *, link: bool = False) -> None:
        """Put weights in the place of those in use, in one step, with the same times."""
        new = self._weights.with_name("new.pt")
        new.unlink(missing_ok=True)
        if link:
            new.symlink_to(source)
        else:
            shutil.copy(source, new)
            os.utime(new, (1, 1))
        new.rename(self._weights)


def _compared(run: Path, whole: Path) -> int:
    assert_same_bits(run, whole)
    return 0


def _killed(name: str, argv: list[str], bench: Bench, after: float) -> int:
    return killed_after(start(lambda: script(name, argv), bench.log), after)


def _digest_on_record(bench: Bench) -> str:
    with closing(sqlite3.connect(bench.trial / "runs.sqlite")) as connection:
        (digest,) = connection.execute("SELECT esm2_config ->> 'sha256' FROM runs").fetchone()
    return str(digest)
