"""System calls: what a script asks of the kernel about files, listed by strace, or killed there.

Between the steps that Python sees lie those of SQLite within a commit and of Parquet within a
file: strace stops at each of them and kills the process before the kernel does what was asked.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests import processes
from tests.processes import Answer
from tests.torture.process import finished, script, start

# Those that change a file or make it durable; names that an architecture lacks have a `?`.
_CALLS = "?open,openat,?link,linkat,?rename,?renameat,?renameat2,?unlink,unlinkat,?mkdir,mkdirat,"
_CALLS += "write,pwrite64,writev,pwritev,fsync,fdatasync,ftruncate,fallocate,flock"
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True)
class Call:
    """A system call of a process: its name, its number among those of that name, its text."""

    name: str
    number: int
    text: str


def is_there() -> bool:
    """Return whether strace is installed and may trace a process."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def traced(
    name: str, argv: Sequence[str], files: Iterable[Path], record: Path, log: Path, at: Call | None
) -> int:
    """Run a script in a fork; return its status, -SIGKILL if it was killed before the call `at`.

    Calls that concern `files` are written to `record`. Raises RuntimeError if strace ends.
    """
    pid = start(lambda: _stopped_first(name, argv), log)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", "-p", str(pid), *_recording(_CALLS, files, record)]
    if at is not None:
        command += ["-e", f"inject={at.name}:signal=KILL:when={at.number}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        while not _has_tracer(pid):
            if tracer.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                finished(pid)
                raise RuntimeError(f"strace: {tracer.stderr.read()}")
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        return finished(pid)


def run(
    name: str, argv: Sequence[object], calls: str, files: Iterable[Path], record: Path
) -> Answer:
    """Run a script to its end in a process of its own (tests/processes.py).

    Its `calls` (names with commas between) of `files` are written to `record`.
    """
    options = _recording(calls, files, record)
    return processes.run(name, *argv, prepare=partial(attach, options))


def _recording(calls: str, files: Iterable[Path], record: Path) -> list[str]:
    """Return strace's options for writing `calls` that concern `files` to `record`."""
    options = ["-y", "-o", str(record), "-e", f"trace={calls}"]
    return options + [word for path in files for word in ("-P", str(path))]


def attach(options: Sequence[str]) -> None:
    """Let strace trace this process, from now on to its end.

    strace keeps the process's standard streams: who reads them to their end has waited for strace.
    """
    _let_anyone_trace()
    pid = os.getpid()
    tracer = subprocess.Popen(["strace", "-f", "-q", *options, "-p", str(pid)])
    while not _has_tracer(pid):
        if tracer.poll() is not None:
            raise RuntimeError(f"strace ended with status {tracer.returncode}")
        time.sleep(0.001)
    time.sleep(0.01)  # until it has stopped the process, too: only then are calls seen


def calls(record: Path) -> list[Call]:
    """Return the calls of a process's first thread that `traced` or `run` wrote, in their order."""
    found = []
    seen: Counter[str] = Counter()
    first = None
    for line in record.read_text(errors="replace").splitlines():
        matched = _LINE.match(line)
        if matched is None:
            continue
        thread, name, text = matched.groups()
        first = first or thread
        if thread == first:
            seen[name] += 1
            found.append(Call(name, seen[name], text))
    return found


def _let_anyone_trace() -> None:
    # Where Yama lets only parents trace, a process may still allow it to anyone.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def _stopped_first(name: str, argv: Sequence[str]) -> int:
    _let_anyone_trace()
    os.kill(os.getpid(), signal.SIGSTOP)
    return script(name, argv)


def _has_tracer(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"^TracerPid:\t0$", status, re.MULTILINE) is None
