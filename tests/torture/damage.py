"""Damage: every stretch of a checkpoint file altered in turn; never read as data.

Each region of 1,024 bytes has one bit flipped at a random place, the file is cut at a random place,
emptied, replaced by a folder or a link, swapped with another of its run and with another run's:
validate.py --run and resume.py must both refuse with status 3. The run database is altered, too.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from tests.reference import assert_same_bits
from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, script

_REGION = 1024
_PAGE = 4096


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Damage four regions and a database in each round, after what is done once.

    Regions are spread over the whole file, and end where all of them were altered.
    """
    bench = make_bench(folder / "damage")
    # The same input and settings: another run all the same, with another uuid in its footers.
    bench.fresh()
    in_fork(lambda: script("embed", bench.embed), bench.log)
    theirs = folder / "theirs.parquet"
    shutil.copy(sorted(bench.run.glob("checkpoint-*"))[0], theirs)
    bench.fresh("finished")
    chance = random.Random(seed)
    first, second = sorted(bench.run.glob("checkpoint-*"))[:2]
    size = first.stat().st_size
    kinds: dict[str, list[Callable[[], object]]] = {
        "checkpoint file truncated": [
            partial(_cut, first, chance.randrange(1, size)) for _ in range(10)
        ],
        "checkpoint file emptied": [partial(_cut, first, 0)],
        "checkpoint file replaced by a folder": [partial(_folder, first)],
        "checkpoint file replaced by a link to it": [partial(_link, first)],
        "checkpoint files swapped": [partial(_swap, first, second)],
    }
    outcomes = [_tried(bench, what, damages) for what, damages in kinds.items()]
    outcomes.append(
        _tried(bench, "checkpoint file of another run", [partial(shutil.copy, theirs, first)])
    )
    regions = list(range(0, size, _REGION))
    chance.shuffle(regions)
    outcomes.append(_altered_databases(bench, chance, rounds))
    missed: list[str] = []
    tried = min(4 * rounds, len(regions))
    for start in regions[:tried]:
        at = min(start + chance.randrange(_REGION), size - 1)
        missed += _missed(bench, partial(_flip, first, at, chance.randrange(8)))
    what = f"one bit of a region of {_REGION} bytes flipped ({tried} of {len(regions)} regions)"
    return [*outcomes, Outcome(what, tried, _DETECTED, "; ".join(missed) or "nothing")]


def _altered_databases(bench: Bench, chance: random.Random, count: int) -> Outcome:
    """Alter the run database; every script ends in one line, and no vector is lost.

    SQLite keeps no checksums: what is altered and still readable may pass, as a host's name does.
    """
    bench.fresh("finished")
    database = bench.trial / "runs.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    bench.keep("one file")
    ends: Counter[int] = Counter()
    lost = []
    for _ in range(count):
        bench.fresh("one file")
        _alter(database, chance)
        for name in ("history", "validate", "resume"):
            status = in_fork(partial(script, name, bench.resume), bench.log)
            ends[status] += 1
            if status not in (0, 2, 3, 4):
                lost.append(f"{name}.py ended with {status}: {bench.said()}")
        if in_fork(partial(_same_vectors, bench), bench.log) != 0:
            lost.append(f"vectors: {bench.said()}")
    trials = ends.total() // 3
    happened = ", ".join(f"{count} ended with {status}" for status, count in sorted(ends.items()))
    what = "run database altered: a page, bits, bytes"
    return Outcome(what, trials, happened, "; ".join(lost[:3]) or "nothing")


def _alter(database: Path, chance: random.Random) -> None:
    content = bytearray(database.read_bytes())
    at = chance.randrange(100, len(content) - 8)
    kind = chance.randrange(3)
    if kind == 0:
        page = at // _PAGE * _PAGE
        content[page : page + _PAGE] = chance.randbytes(_PAGE)
    elif kind == 1:
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(100, len(content))] ^= 1 << chance.randrange(8)
    else:
        content[at : at + 8] = chance.choice([bytes(8), b"\xff" * 8, chance.randbytes(8)])
    database.write_bytes(content)


def _same_vectors(bench: Bench) -> int:
    assert_same_bits(bench.run, bench.reference)
    return 0


_DETECTED = "refused by validate.py and resume.py"


def _tried(bench: Bench, what: str, damages: list[Callable[[], object]]) -> Outcome:
    missed = [fact for damage in damages for fact in _missed(bench, damage)]
    return Outcome(what, len(damages), _DETECTED, "; ".join(missed) or "nothing")


def _missed(bench: Bench, damage: Callable[[], object]) -> list[str]:
    """Return which scripts took a damaged run for good."""
    bench.fresh("finished")
    damage()
    found = []
    for name in ("validate", "resume"):
        status = in_fork(partial(script, name, bench.resume), bench.log)
        if status != 3:
            found.append(f"{name}.py ended with {status}: {bench.said()}")
    return found


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    shutil.move(path, target)
    path.symlink_to(target)


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
