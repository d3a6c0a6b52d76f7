"""Kill: SIGKILL at every step that touches the disk, and at random times; then resume and compare.

A script's moments (before and after each write, fsync, rename, folder fsync, row and commit, each
file opened, the database made, weights loaded) are listed by a run that nobody kills. A limit to
the size of files ends a process within a write, at any byte of a checkpoint or of SQLite's log.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, killed_after, limited, script, start, watched


@dataclass
class Tally:
    """What was tried of one kind, where it was killed, and what was lost."""

    what: str
    trials: int = 0
    points: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


class Kills:
    """Kinds of trial, each on a bench, each ending in a comparison with the uninterrupted run."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.chance = random.Random(seed)
        self._moments = bench.folder / "moments"
        self._queues: dict[str, list[int]] = {}
        bench.fresh()
        since = time.monotonic()
        self._watched("embed", bench.embed, 0)
        self._seconds = time.monotonic() - since
        self._of_embed = self._moments.read_text().splitlines()

    def killed(self, kind: str, name: str, *flags: str) -> str:
        """Run a script to be killed at a moment not yet tried; return the moment's name."""
        argv = [*(self.bench.embed if name == "embed" else self.bench.resume), *flags]
        number = self._next(kind, name, argv)
        status = self._watched(name, argv, number)
        said = self._moments.read_text().splitlines()
        if status == -signal.SIGKILL:
            return said[-1]
        return f"ended with {status} before moment {number}"

    def first_start(self, tally: Tally) -> None:
        self.bench.fresh()
        tally.points[self.killed("embed", "embed")] += 1

    def resume(self, tally: Tally) -> None:
        self.half_a_run()
        tally.points[self.killed("resume", "resume")] += 1

    def second_resume(self, tally: Tally) -> None:
        self.half_a_run()
        self._watched("resume", self.bench.resume, self.chance.randint(40, 70))
        tally.points[self.killed("second resume", "resume")] += 1

    def recompute(self, tally: Tally) -> None:
        self._damaged()
        tally.points[self.killed("recompute", "resume", "--recompute-damaged")] += 1
        # Killed before the damaged file left the record, it has to be asked for again.
        flags = [*self.bench.resume, "--recompute-damaged"]
        in_fork(lambda: script("resume", flags), self.bench.log)

    def any_time(self, tally: Tally) -> None:
        self.bench.fresh()
        pid = start(lambda: script("embed", self.bench.embed), self.bench.log)
        status = killed_after(pid, self.chance.uniform(0, self._seconds))
        tally.points["killed" if status == -signal.SIGKILL else "ended"] += 1

    def within_a_write(self, tally: Tally) -> None:
        self.bench.fresh("finished")
        largest = max(path.stat().st_size for path in self.bench.run.glob("checkpoint-*"))
        self.bench.fresh()
        size = self.chance.randrange(4096, largest)
        embed = partial(limited, "embed", self.bench.embed, size)
        status = in_fork(embed, self.bench.log)
        cut = {path.name for path in self.bench.trial.rglob("*") if path.stat().st_size == size}
        killed = status == -signal.SIGXFSZ and cut
        tally.points[f"within {min(cut)}" if killed else f"ended with {status}"] += 1

    def _next(self, kind: str, name: str, argv: list[str]) -> int:
        """Return a moment of this kind of trial, each once before any again."""
        if not self._queues.get(kind):
            count = len(self._of_embed if argv == self.bench.embed else self._listed(name, argv))
            self._queues[kind] = self.chance.sample(range(1, count + 1), count)
        return self._queues[kind].pop()

    def _listed(self, name: str, argv: list[str]) -> list[str]:
        """Return the moments of a script that nobody kills."""
        self.bench.keep_aside()
        self._watched(name, argv, 0)
        self.bench.bring_back()
        return self._moments.read_text().splitlines()

    def _watched(self, name: str, argv: list[str], kill_at: int) -> int:
        folder = self.bench.folder
        return in_fork(lambda: watched(name, argv, folder, self._moments, kill_at), self.bench.log)

    def half_a_run(self) -> None:
        """Leave a run that was killed after its second checkpoint."""
        if not (self.bench.folder / "half").exists():
            named = [i for i, text in enumerate(self._of_embed, start=1) if text == "after link"]
            self.bench.fresh()
            # The first link is that of the lock.
            self._watched("embed", self.bench.embed, named[2])
            self.bench.keep("half")
        self.bench.fresh("half")

    def _damaged(self) -> None:
        self.bench.fresh("finished")
        files = sorted(self.bench.run.glob("checkpoint-*"))
        content = bytearray(files[1].read_bytes())
        content[300] ^= 0xFF
        files[1].write_bytes(content)


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Kill once of every kind in each round."""
    kills = Kills(make_bench(folder / "kill"), seed)
    kinds = [
        (kills.first_start, Tally("SIGKILL in embed.py, at each step in turn")),
        (kills.resume, Tally("SIGKILL in resume.py")),
        (kills.second_resume, Tally("SIGKILL in a second resume.py")),
        (kills.recompute, Tally("SIGKILL in resume.py --recompute-damaged")),
        (kills.any_time, Tally("SIGKILL in embed.py, at a random time")),
        (kills.within_a_write, Tally("SIGXFSZ in embed.py, at a random byte of a file")),
    ]
    return tried(kills.bench, kinds, rounds)


def tried(
    bench: Bench, kinds: Sequence[tuple[Callable[[Tally], object], Tally]], rounds: int
) -> list[Outcome]:
    """Try each kind once in each round; resume after each, and compare."""
    for _ in range(rounds):
        for kill, tally in kinds:
            kill(tally)
            tally.trials += 1
            wrong = bench.to_the_end()
            if wrong:
                tally.lost.append(f"{list(tally.points)[-1]}: {wrong}")
    return [
        Outcome(tally.what, tally.trials, _happened(tally), "; ".join(tally.lost) or "nothing")
        for _, tally in kinds
    ]


def _happened(tally: Tally) -> str:
    ended = sum(count for point, count in tally.points.items() if point.startswith("ended"))
    killed = tally.trials - ended
    return f"{killed} killed at {len(tally.points)} kinds of step, resumed: the same bits"
