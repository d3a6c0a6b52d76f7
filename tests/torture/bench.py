"""The bench that runs are tortured on: a small untrained model, a run to compare with, checks."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lib.models.untrained import make_model
from lib.settings import DEFAULT_CONFIG
from tests.conftest import WHOLE_PROTEINS
from tests.reference import assert_same_bits
from tests.torture.process import in_fork, script


@dataclass(frozen=True)
class Bench:
    """A folder whose `trial` is what a trial works in; `reference` holds an uninterrupted run.

    number: of the run that is tried; before: the name of what is there when it starts.
    """

    folder: Path
    number: int = 1
    before: str | None = None

    @property
    def trial(self) -> Path:
        return self.folder / "trial"

    @property
    def run(self) -> Path:
        return self.trial / "embeddings" / f"run-{self.number:06d}"

    @property
    def reference(self) -> Path:
        return self.folder / "reference" / f"run-{self.number:06d}"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def flags(self) -> list[str]:
        return ["--config", str(self.folder / "config.ini")]

    @property
    def embed(self) -> list[str]:
        """Arguments of embed.py: 15 proteins, five checkpoints, everything kept."""
        return [
            *self.flags,
            *("--esm-model", str(self.folder / "esm2_small.pt"), "--input", str(WHOLE_PROTEINS)),
            *("--database", str(self.trial / "runs.sqlite")),
            *("--output", str(self.trial / "embeddings"), "--include", "mean", "bos", "per_tok"),
            *("--set", "output.checkpoint_records=2", "--set", "compute.tokens_per_pack=300"),
            *("--set", "compute.threads=1"),
        ]

    @property
    def resume(self) -> list[str]:
        database = str(self.trial / "runs.sqlite")
        return [*self.flags, "--run", str(self.number), "--database", database]

    def fresh(self, template: str | None = None) -> None:
        """Empty the trial's folder, or fill it with what was kept under a name."""
        template = template or self.before
        shutil.rmtree(self.trial, ignore_errors=True)
        if template is None:
            self.trial.mkdir()
        else:
            shutil.copytree(self.folder / template, self.trial, symlinks=True)

    def keep(self, template: str) -> None:
        """Keep the trial's folder under a name."""
        shutil.copytree(self.trial, self.folder / template, symlinks=True)

    def keep_aside(self) -> None:
        """Keep the trial's folder for a while."""
        shutil.rmtree(self.folder / "aside", ignore_errors=True)
        self.keep("aside")

    def bring_back(self) -> None:
        """Undo everything since `keep_aside`."""
        self.fresh("aside")

    def to_the_end(self) -> str:
        """Resume the run, or start it if its record was not made; return what is wrong after."""
        return self.ended() or self.lost()

    def ended(self) -> str:
        """Resume the run, or start it if its record was not made; return what it died of."""
        status = in_fork(lambda: script("resume", self.resume), self.log)
        if status == 2 and not self.is_recorded():
            status = in_fork(lambda: script("embed", self.embed), self.log)
        return "" if status == 0 else f"status {status}: {self.said()}"

    def lost(self) -> str:
        """Return what a finished run lost: "" if nothing."""
        return "" if in_fork(self._check, self.log) == 0 else self.said()

    def said(self) -> str:
        """Return the last line that a fork said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing was said"

    def is_recorded(self) -> bool:
        """Return whether the trial's database lists a run."""
        database = self.trial / "runs.sqlite"
        if not database.exists() or database.stat().st_size == 0:
            return False
        with closing(sqlite3.connect(database)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema")]
            ours = "SELECT 1 FROM runs WHERE id = ?"
            return "runs" in tables and bool(connection.execute(ours, [self.number]).fetchall())

    def _check(self) -> int:
        self.check_record()
        assert_same_bits(self.run, self.reference)
        return 0

    def check_record(self) -> None:
        """Raise AssertionError unless the record and the files of the run belong together."""
        ours = [self.number]
        with closing(sqlite3.connect(self.trial / "runs.sqlite")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            states = connection.execute("SELECT id, status FROM runs ORDER BY id").fetchall()
            assert states == [(number, "finished") for number in range(1, self.number + 1)]
            open_attempts = "SELECT count(*) FROM attempts WHERE ended_at IS NULL"
            assert connection.execute(open_attempts).fetchall() == [(0,)], "an attempt is open"
            files = connection.execute(
                "SELECT path, bytes, sha256, first_position, stop_position FROM checkpoints "
                "WHERE run_id = ? ORDER BY first_position",
                ours,
            ).fetchall()
            totals = "SELECT sequences_total FROM runs WHERE id = ?"
            (total,) = connection.execute(totals, ours).fetchone()
        position = 0
        for name, size, digest, first, stop in files:
            content = (self.run / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest), name
            assert first == position, f"{name}: begins at {first}, not at {position}"
            position = stop
        assert position == total, f"ends at {position} of {total}"
        # What `--recompute-damaged` took off the record is kept aside: the second file.
        kept = {path.name for path in self.run.glob(".checkpoint-000002.parquet.kept-*")}
        there = {path.name for path in self.run.iterdir()} - kept
        # A plan of a start that was killed before its run was on record stays.
        there = {name for name in there if not name.startswith(".reuse-")}
        assert there == {".lock", *(row[0] for row in files)}, f"files: {sorted(there)}"


def make_bench(folder: Path) -> Bench:
    """Make a bench: the model (untrained), the uninterrupted run, and a finished trial."""
    bench = Bench(folder)
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text(DEFAULT_CONFIG.read_text())
    make_model(folder / "esm2_small.pt", 2, 64, 4)
    bench.fresh()
    status = in_fork(lambda: script("embed", bench.embed), bench.log)
    if status != 0:
        raise RuntimeError(f"embed.py: status {status}: {bench.said()}")
    shutil.copytree(bench.trial / "embeddings", folder / "reference")
    bench.keep("finished")
    return bench
