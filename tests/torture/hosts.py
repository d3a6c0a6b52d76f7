"""Hosts: two machines of a Ray cluster, each with a network and mounts of its own, and their link.

They are namespaces of this machine, which only root may make. On the second one the link is cut and
healed while it computes, other weights lie at the path of ours, or the output folder is its own.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lib.models.untrained import make_model
from tests.conftest import ROOT, UNIPROT_PART
from tests.reference import assert_same_bits, fasta, write_fasta
from tests.torture.bench import Bench, make_bench
from tests.torture.outcome import Outcome
from tests.torture.process import in_fork, script

_ADDRESSES = ("10.213.7.1", "10.213.7.2")
_PORT = 6399
_SECONDS = 240
# So that a cut link is noticed in seconds.
_QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Hosts:
    """Two network namespaces and the cable between them."""

    def __init__(self, folder: Path) -> None:
        self._names = tuple(f"esm-ledger-{os.getpid()}-{i}" for i in range(2))
        self.ray_folder = folder
        self._environment = {
            **os.environ,
            **_QUICK_TO_NOTICE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }

    @property
    def address(self) -> str:
        return f"{_ADDRESSES[0]}:{_PORT}"

    def connect(self) -> None:
        ends = [f"esl{os.getpid() % 10_000}{i}" for i in range(2)]
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self._names, ends, _ADDRESSES, strict=True):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "set", end, "netns", name, "name", "cable")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _run("ip", "-n", name, "link", "set", device, "up")

    def link(self, state: str) -> None:
        """Cut the cable (down) or heal it (up)."""
        _run("ip", "-n", self._names[1], "link", "set", "cable", state)

    def start_ray(self, mounts: str) -> None:
        """Start Ray on both; mounts: shell commands that lay out the second one's files."""
        ray = f"{sys.executable} -m ray.scripts.scripts start --disable-usage-stats --num-cpus=1"
        ray += " --object-store-memory=100000000 --block"
        first = f"{ray} --head --include-dashboard=false --port={_PORT}"
        first += f" --temp-dir={self.ray_folder}"
        self.start(0, ["sh", "-c", f"exec {first} --node-ip-address={_ADDRESSES[0]}"])
        health = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address"]
        _until(lambda: self.start(0, [*health, self.address]).wait() == 0)
        own = f"mount --make-rprivate / && mount -t tmpfs tmpfs {self.ray_folder}"
        second = f"{ray} --address={self.address} --node-ip-address={_ADDRESSES[1]}"
        laid_out = " && ".join([own, *filter(None, [mounts]), f"exec {second}"])
        log = self.ray_folder.with_suffix(".log")
        self.start(1, ["unshare", "--mount", "sh", "-c", laid_out], log)
        _until(lambda: "Ray runtime started" in log.read_text())
        log.unlink()

    def start(
        self, host: int, command: list[str], log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a program on a host; its output goes to a file."""
        with open(log or os.devnull, "w") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._names[host], *command],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True,
                cwd=ROOT, env=self._environment,
            )  # fmt: skip

    def end(self) -> None:
        """End every process of the two hosts, and the hosts."""
        for name in self._names:
            listed = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout
            for number in listed.split():
                os.kill(int(number), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Try each fault once for every twenty rounds, at least once."""
    del seed  # what is tried holds at any moment
    missing = _missing()
    if missing:
        return [Outcome("two hosts", 0, f"not tried: {missing}", "nothing")]
    bench = _bench(folder)
    times = max(1, rounds // 20)
    return [
        _tried(bench, "a link cut and healed while both hosts compute", _cut, times),
        _tried(bench, "other weights on one of two hosts", _other_weights, times),
        _tried(bench, "an output folder that only one host has", _own_folder, times),
    ]


def _missing() -> str | None:
    """Return what this machine lacks."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed"
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return "namespaces need root, ip and unshare"
    made = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True)
    return None if made.returncode == 0 else "namespaces are not allowed"


def _bench(folder: Path) -> Bench:
    """Return a bench with a run of more records, so that there is time to cut a link."""
    bench = make_bench(folder)
    make_model(bench.folder / "other.pt", 2, 64, 4, seed=1)
    entries = fasta(UNIPROT_PART)
    many = [
        (f"{turn}-{name}", text[turn:] + text[:turn])
        for turn in range(40)
        for name, text in entries
    ]
    write_fasta(bench.folder / "many.fasta", many)
    bench.fresh()
    assert in_fork(lambda: script("embed", _flags(bench)), bench.log) == 0
    shutil.rmtree(bench.folder / "reference", ignore_errors=True)
    shutil.move(bench.trial / "embeddings", bench.folder / "reference")
    return bench


def _flags(bench: Bench) -> list[str]:
    return [
        *bench.embed, "--input", str(bench.folder / "many.fasta"),
        "--set", "output.checkpoint_seconds=0", "--set", "input.duplicate_ids=keep",
    ]  # fmt: skip


def _tried(
    bench: Bench, what: str, trial: Callable[[Bench, Counter[str]], str | None], times: int
) -> Outcome:
    found: Counter[str] = Counter()
    wrong = [fault for _ in range(times) if (fault := trial(bench, found)) is not None]
    happened = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    return Outcome(what, times, happened, "; ".join(wrong) or "nothing")


@contextmanager
def _hosts(bench: Bench, mounts: str = "") -> Iterator[Hosts]:
    bench.fresh()
    (bench.trial / "embeddings").mkdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    hosts = Hosts(folder)
    try:
        hosts.connect()
        hosts.start_ray(mounts)
        yield hosts
    finally:
        hosts.end()
        shutil.rmtree(folder, ignore_errors=True)


def _embed(hosts: Hosts, bench: Bench) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "embed.py"), *_flags(bench)]
    return hosts.start(0, [*command, "--ray", hosts.address], bench.log)


def _cut(bench: Bench, found: Counter[str]) -> str | None:
    with _hosts(bench) as hosts:
        process = _embed(hosts, bench)
        _until(lambda: _by_workers(bench) >= 2 or process.poll() is not None)
        hosts.link("down")
        _until(lambda: ": lost: " in bench.log.read_text() or process.poll() is not None)
        late = len(list(bench.run.glob(".*.tmp")))
        found["files that a worker cut off had begun"] += late
        hosts.link("up")
        return _ended(process, bench, found, "lost: ")


def _other_weights(bench: Bench, found: Counter[str]) -> str | None:
    mounts = f"mount --bind {bench.folder / 'other.pt'} {bench.folder / 'esm2_small.pt'}"
    with _hosts(bench, mounts) as hosts:
        return _ended(_embed(hosts, bench), bench, found, "refused: sha256 is ")


def _own_folder(bench: Bench, found: Counter[str]) -> str | None:
    with _hosts(bench, f"mount -t tmpfs tmpfs {bench.trial / 'embeddings'}") as hosts:
        return _ended(_embed(hosts, bench), bench, found, "its files are sent")


def _ended(
    process: subprocess.Popen[str], bench: Bench, found: Counter[str], word: str
) -> str | None:
    """Wait for a run; return what is wrong with it."""
    status = process.wait(_SECONDS)
    said = bench.log.read_text()
    if status != 0:
        return f"status {status}: {said[-300:]!r}"
    if word not in said or "Traceback" in said:
        return f"not said: {word}: {said[-300:]!r}"
    found[word.strip(": ")] += said.count(word)
    try:
        assert_same_bits(bench.run, bench.reference)
    except AssertionError as error:
        return f"other bits: {error!r:.300}"
    listed = {".lock", *_rows(bench, "SELECT path FROM checkpoints")}
    strange = {path.name for path in bench.run.iterdir()} - listed
    if strange:
        return f"not listed: {sorted(strange)}"
    found["the same bits"] += 1
    return None


def _by_workers(bench: Bench) -> int:
    """Return how many workers have a checkpoint."""
    if not (bench.trial / "runs.sqlite").exists():
        return 0
    return len(_rows(bench, "SELECT DISTINCT worker_id FROM checkpoints"))


def _rows(bench: Bench, statement: str) -> list[str]:
    try:
        with closing(sqlite3.connect(bench.trial / "runs.sqlite")) as connection:
            return [row[0] for row in connection.execute(statement)]
    except sqlite3.OperationalError:  # it is just being made
        return []


def _until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while not happens():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
