"""Reuse: a run that copies, killed at every step, and its sources damaged on purpose.

Run 1 has nine of the fifteen proteins, in several files. Run 2 copies them and computes the others:
it is killed while it plans, copies, commits, computes and is resumed. Files and rows of run 1 are
damaged before run 2 plans, or after: run 2 computes what it cannot copy, whether it is killed in
that or not.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.conftest import WHOLE_PROTEINS
from tests.reference import assert_near, assert_same_bits, fasta, write_fasta
from tests.torture.bench import Bench, make_bench
from tests.torture.kill import Kills, Tally, tried
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, script

_COPIED = 9
_COPIED_RECORDS = "SELECT ifnull(sum(records), 0) FROM checkpoints WHERE reused_run_id = 1"


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Kill once of every kind, and damage once before the plan and once after, in each round."""
    bench = _bench(folder / "reuse")
    kills, damages = Kills(bench, seed), _Damages(bench, seed)
    kinds = [
        (kills.first_start, Tally("SIGKILL in an embed.py that reuses, at each step in turn")),
        (kills.resume, Tally("SIGKILL in resume.py of a run that reuses")),
        (kills.second_resume, Tally("SIGKILL in a second resume.py of a run that reuses")),
        (kills.any_time, Tally("SIGKILL in an embed.py that reuses, at a random time")),
    ]
    return [
        *tried(bench, kinds, rounds),
        damages.tried("a source damaged before reuse is planned", damages.before, rounds),
        damages.tried(
            "a source damaged after, and SIGKILL in resume.py",
            partial(damages.after, kills),
            rounds,
        ),
    ]


def _bench(folder: Path) -> Bench:
    """Return a bench whose trials begin with the finished run 1; run 2 is tried."""
    plain = make_bench(folder)
    chosen = random.Random(1).sample(fasta(WHOLE_PROTEINS), _COPIED)
    part = write_fasta(folder / "part.fasta", chosen)
    plain.fresh()
    _embedded(plain, [str(part) if one == str(WHOLE_PROTEINS) else one for one in plain.embed])
    plain.keep("before")
    bench = replace(plain, number=2, before="before")
    bench.fresh()
    _embedded(bench, bench.embed)
    copied = _ask(bench, _COPIED_RECORDS)
    assert copied == [_COPIED], copied
    shutil.copytree(bench.run, bench.reference)
    shutil.rmtree(folder / "finished")
    bench.keep("finished")
    return bench


def _embedded(bench: Bench, argv: list[str]) -> None:
    status = in_fork(lambda: script("embed", argv), bench.log)
    if status != 0:
        raise RuntimeError(f"embed.py: status {status}: {bench.said()}")


class _Damages:
    """Damages to run 1, and what run 2 has to be after each."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench, self._chance = bench, random.Random(seed)
        there = bench.folder / "before" / "embeddings" / "run-000001"
        self._files = sorted(path.name for path in there.glob("checkpoint-*"))
        self._instead = 0  # trials of `after` whose damage came before the rows were copied
        self._source = bench.trial / "embeddings" / "run-000001"
        self._kinds: dict[str, Callable[[Path], object]] = {
            "bits flipped": self._flip,
            "cut": self._cut,
            "emptied": lambda path: path.write_bytes(b""),
            "removed": Path.unlink,
            "exchanged": self._exchange,
            "digests altered": lambda path: self._change(path, "sha256 = 'ab'"),
            "models altered": lambda path: self._change(
                path, "esm2_config = json_set(esm2_config, '$.sha256', 'ab')"
            ),
            "pruned": lambda _: self._execute(
                "UPDATE runs SET pruned_at = '2026-01-01T00:00:00Z' WHERE id = 1"
            ),
        }  # fmt: skip

    def tried(
        self, what: str, trial: Callable[[Callable[[], object]], str], rounds: int
    ) -> Outcome:
        """Try a kind of damage after the other; a trial returns what is wrong after it."""
        names = list(self._kinds)
        done: Counter[str] = Counter()
        lost = []
        for number in range(rounds):
            name = names[number % len(names)]
            path = self._source / self._chance.choice(self._files)
            wrong = trial(partial(self._damage, name, path, self._chance.randrange(1 << 30)))
            if wrong:
                lost.append(f"{name}: {path.name}: {wrong}")
            done[name] += 1
        happened = ", ".join(f"{count} {name}" for name, count in done.items())
        instead = f"{self._instead} " if self._instead else ""
        happened = f"{happened}: {instead}computed instead"
        return Outcome(what, rounds, happened, "; ".join(lost) or "nothing")

    def before(self, damage: Callable[[], object]) -> str:
        self._bench.fresh()
        damage()
        wrong = self._ended("embed", self._bench.embed) or self._wrong(self._same_or_near)
        return wrong or ("" if self._computed_instead() else "nothing was computed instead")

    def after(self, kills: Kills, damage: Callable[[], object]) -> str:
        """Damage a source of half a run; resume it, and do the same again with a kill in it."""
        bench, aside = self._bench, self._bench.folder / "uninterrupted"
        kills.half_a_run()
        damage()
        wrong = self._ended("resume", bench.resume) or self._wrong(self._same_or_near)
        if wrong:
            return wrong
        self._instead += self._computed_instead()
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(bench.run, aside)
        kills.half_a_run()
        damage()
        kills.killed("damaged", "resume")
        return bench.ended() or self._wrong(lambda: assert_same_bits(bench.run, aside))

    def _ended(self, name: str, argv: list[str]) -> str:
        status = in_fork(lambda: script(name, argv), self._bench.log)
        return "" if status == 0 else f"status {status}: {self._bench.said()}"

    def _wrong(self, compare: Callable[[], None]) -> str:
        def check() -> int:
            self._bench.check_record()
            compare()
            return 0

        return "" if in_fork(check, self._bench.log) == 0 else self._bench.said()

    def _same_or_near(self) -> None:
        """Compare with the run that copied all that it could: what this one copied has its bits."""
        run = self._bench.run
        copied = _ask(self._bench, "SELECT path FROM checkpoints WHERE reused_run_id = 1")
        records = [
            record
            for name in copied
            for record in pq.read_table(run / str(name)).column("record").to_pylist()
        ]
        assert_near(run, self._bench.reference, same_bits_for=records)

    def _computed_instead(self) -> bool:
        return sum(map(int, _ask(self._bench, _COPIED_RECORDS))) < _COPIED

    # ---- Damages

    def _damage(self, name: str, path: Path, seed: int) -> None:
        """Do a damage, the same one every time that it is asked for with the same seed."""
        self._chance.seed(seed)
        self._kinds[name](path)

    def _flip(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[self._chance.randrange(len(content))] ^= 1 << self._chance.randrange(8)
        path.write_bytes(content)

    def _cut(self, path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: self._chance.randrange(1, len(content))])

    def _exchange(self, path: Path) -> None:
        others = sorted({*self._source.glob("checkpoint-*")} - {path})
        shutil.copy(self._chance.choice(others), path)

    def _change(self, path: Path, what: str) -> None:
        self._execute(f"UPDATE checkpoints SET {what} WHERE path = '{path.name}' AND run_id = 1")

    def _execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self._bench.trial / "runs.sqlite")) as connection, connection:
            connection.execute(statement)


def _ask(bench: Bench, statement: str) -> list[Any]:
    with closing(sqlite3.connect(bench.trial / "runs.sqlite")) as connection:
        return [row[0] for row in connection.execute(statement)]
