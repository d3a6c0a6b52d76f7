"""Damage: every stretch of a checkpoint file altered in turn; never read as data.

Each region of 1,024 bytes has one bit flipped at a random place, the file is cut at a random place,
emptied, replaced by a folder or a link, swapped with another of its run and with another run's:
validate.py --run and resume.py must both refuse with status 3.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, script

_REGION = 1024


def trials(folder: Path, seconds: float, seed: int) -> list[Outcome]:
    """Damage for so many seconds, regions spread over the whole file."""
    until = time.monotonic() + seconds
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
    missed: list[str] = []
    tried = 0
    for start in regions:
        if time.monotonic() > until:
            break
        at = min(start + chance.randrange(_REGION), size - 1)
        missed += _missed(bench, partial(_flip, first, at, chance.randrange(8)))
        tried += 1
    what = f"one bit of a region of {_REGION} bytes flipped ({tried} of {len(regions)} regions)"
    return [*outcomes, Outcome(what, tried, _DETECTED, "; ".join(missed) or "nothing")]


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
