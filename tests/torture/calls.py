"""Calls: SIGKILL before system calls on the database and on checkpoint files; then resume, compare.

A transaction is a dozen writes to SQLite's log and one fdatasync, a checkpoint file is twenty
writes: strace lists them all in a run that nobody kills, and kills at each in turn.
"""

from __future__ import annotations

import random
import signal
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from lib.ledger.checkpoints import checkpoint_name, temporary_name
from tests.torture import strace
from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, script
from tests.torture.strace import Call

_WAL_HEADER, _FRAME_HEADER = 32, 24


@dataclass
class _Kind:
    """Trials of one script, begun in the state that `begin` makes."""

    what: str
    name: str
    argv: list[str]
    begin: Callable[[], None]
    left: list[Call] = field(default_factory=list)
    trials: int = 0
    found: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def outcome(self) -> Outcome:
        parts = [f"{count} {what}" for what, count in sorted(self.found.items())]
        happened = f"{', '.join(parts)}; resumed: the same bits"
        return Outcome(self.what, self.trials, happened, "; ".join(self.lost) or "nothing")


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Kill each of the scripts once in each round; nothing is tried without strace."""
    what = "SIGKILL before a system call of "
    if not strace.is_there():
        return [Outcome(f"{what}any script", 0, "not tried: no strace", "nothing")]
    bench = make_bench(folder / "calls")
    of_embed = _keep_half_a_run(bench)
    recompute = [*bench.resume, "--recompute-damaged"]
    kinds = [
        _Kind(f"{what}embed.py", "embed", bench.embed, bench.fresh),
        _Kind(f"{what}resume.py", "resume", bench.resume, lambda: bench.fresh("half")),
        _Kind(f"{what}recomputing", "resume", recompute, lambda: _damaged(bench)),
    ]
    chance = random.Random(seed)
    chance.shuffle(of_embed)
    kinds[0].left = of_embed
    for _ in range(rounds):
        for kind in kinds:
            _kill(bench, kind, chance)
    return [kind.outcome() for kind in kinds]


def _kill(bench: Bench, kind: _Kind, chance: random.Random) -> None:
    """Kill at a call not yet tried, count what it left, go on to the end and compare."""
    if not kind.left:
        kind.begin()
        kind.left = _calls(bench, kind.name, kind.argv)
        chance.shuffle(kind.left)
    call = kind.left.pop()
    kind.begin()
    kind.trials += 1
    status = _traced(bench, kind.name, kind.argv, call)
    if status != -signal.SIGKILL:
        kind.lost.append(f"{call.name} {call.number}: ended with {status}: {bench.said()}")
        return
    kind.found[_where(bench, call)] += 1
    if "--recompute-damaged" in kind.argv:
        # Killed before the damaged file left the record, it has to be asked for again.
        in_fork(lambda: script(kind.name, kind.argv), bench.log)
    wrong = bench.to_the_end()
    if wrong:
        kind.lost.append(f"{call.name} {call.number}: {wrong}")


def _where(bench: Bench, call: Call) -> str:
    """Tell where a kill fell, as far as possible by what it left on disk."""
    if "/runs.sqlite>" in call.text:
        return "while the database itself was written"
    log = bench.trial / "runs.sqlite-wal"
    if log.exists() and _ends_within_a_transaction(log.read_bytes()):
        return "within a transaction"
    unfinished = [path.stat().st_size for path in bench.run.glob(".attempt-*")]
    if any(unfinished):
        return "within a checkpoint file"
    return "between"


def _ends_within_a_transaction(log: bytes) -> bool:
    """Whether the newest frames of a SQLite log are not committed, or the last is cut.

    sqlite.org/fileformat2.html, 4.1: a frame's header holds the database's size in pages if it
    commits, else 0, and repeats the salts of the log's header if it is not an older frame.
    """
    if len(log) < _WAL_HEADER:
        return bool(log)
    page_size, salts = *struct.unpack(">I", log[8:12]), log[16:24]
    pages = 1
    for at in range(_WAL_HEADER, len(log), _FRAME_HEADER + page_size):
        frame = log[at : at + _FRAME_HEADER + page_size]
        if len(frame) >= _FRAME_HEADER and frame[8:16] != salts:
            break
        pages = struct.unpack(">I", frame[4:8])[0] if len(frame) == _FRAME_HEADER + page_size else 0
    return pages == 0


def _keep_half_a_run(bench: Bench) -> list[Call]:
    """Keep a run that was killed between its second file's new name and its row.

    Returns the calls of one that nobody kills.
    """
    bench.fresh()
    calls = _calls(bench, "embed", bench.embed)
    named = [i for i, call in enumerate(calls) if call.name.startswith("link")]
    bench.fresh()
    # The first link is that of the lock.
    _traced(bench, "embed", bench.embed, calls[named[2] + 1])
    bench.keep("half")
    return calls


def _damaged(bench: Bench) -> None:
    bench.fresh("finished")
    file = sorted(bench.run.glob("checkpoint-*"))[1]
    content = bytearray(file.read_bytes())
    content[300] ^= 0xFF
    file.write_bytes(content)


def _calls(bench: Bench, name: str, argv: list[str]) -> list[Call]:
    _traced(bench, name, argv, None)
    return strace.calls(bench.folder / "calls")


def _traced(bench: Bench, name: str, argv: list[str], at: Call | None) -> int:
    database = bench.trial / "runs.sqlite"
    files = [database, *(Path(f"{database}-{part}") for part in ("wal", "shm", "journal"))]
    files += [bench.trial, bench.run.parent, bench.run, bench.run / ".lock"]
    for number in range(1, 10):
        files.append(bench.run / checkpoint_name(number))
    # Attempts at a run of 15 records.
    for attempt, position in product(range(1, 4), range(15)):
        files.append(bench.run / temporary_name(attempt, position))
    return strace.traced(name, argv, files, bench.folder / "calls", bench.log, at)
