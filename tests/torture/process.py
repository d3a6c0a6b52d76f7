"""Processes to torture: a script run in a fork of this one, watched, and killed at a moment.

The parent has imported everything and computes nothing, so that a fork is a fresh process that
starts in a hundredth of a second. Forks are changed freely: what they patch dies with them.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.orm import configure_mappers

import scripts.embed
import scripts.history
import scripts.resume
import scripts.validate
from lib.console.program import guarded

# Once here instead of in every fork: the scripts and the tables.
_MAINS = {
    one.__name__.rpartition(".")[2]: one.main
    for one in (scripts.embed, scripts.history, scripts.resume, scripts.validate)
}
configure_mappers()

# Before and after each of these is a moment. (os.fsync is told apart by what it syncs.)
_STEPS = [
    ("os", "", "fsync"),
    ("os", "", "link"),
    ("pathlib", "Path", "rename"),
    ("pathlib", "Path", "mkdir"),
    ("pathlib", "Path", "unlink"),
    ("pyarrow.parquet", "ParquetWriter", "write_table"),
    ("pyarrow.parquet", "ParquetWriter", "close"),
    ("sqlalchemy.engine.default", "DefaultDialect", "do_commit"),
    ("lib.ledger.database", "", "_choose_journal"),
    ("lib.jobs.loading", "", "load_network"),
    ("lib.jobs.reuse", "_Search", "look_into"),
    ("lib.ledger.runs", "", "write_plan"),
    ("lib.jobs.reuse", "SourceFiles", "verified"),
    ("lib.jobs.embedding", "", "rearranged_windows"),
    ("lib.network.pipeline", "", "launch"),
    ("lib.jobs.admission", "", "detect"),
    ("lib.jobs.admission", "", "preflight"),
    ("scripts.embed", "", "preflight"),
]
_MOST_SECONDS = 300
_AUDITED = ("open", "fcntl.flock", "sqlite3.connect", "os.remove", "os.mkdir", "os.rename")


def in_fork(work: Callable[[], int], log: Path) -> int:
    """Return the status of `work` done in a fork, negative for a signal; `log` takes its output."""
    return finished(start(work, log))


def start(work: Callable[[], int], log: Path) -> int:
    """Begin `work` in a fork and return its process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    signal.alarm(_MOST_SECONDS)  # what hangs is ended, and told by its status
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        status = work()
    except BaseException as error:  # a fork must never return into the parent's code
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finished(pid: int) -> int:
    """Wait for a process; return its status, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def script(name: str, argv: Sequence[str]) -> int:
    """Run a script's main as it runs on the command line."""
    return guarded(_MAINS[name], argv)


def watched(name: str, argv: Sequence[str], folder: Path, moments: Path, kill_at: int) -> int:
    """Run a script, writing each moment to `moments`; die of SIGKILL at number `kill_at`.

    folder: files in it are watched. Moments count from 1; 0 kills at none.
    """
    record = os.open(moments, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def moment(text: str) -> None:
        nonlocal count
        count += 1
        os.write(record, f"{text}\n".encode())
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for module, holder, step in _STEPS:
        place: Any = import_module(module)
        _watch(getattr(place, holder) if holder else place, step, moment)

    def executed(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        moment(f"after {statement.split()[0]}")

    def audited(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _AUDITED and (name == "fcntl.flock" or str(folder) in str(arguments[0])):
            moment(f"before {name}")

    event.listen(Engine, "after_cursor_execute", executed)
    sys.addaudithook(audited)
    return script(name, argv)


def limited(name: str, argv: Sequence[str], size: int) -> int:
    """Run a script that the kernel ends within the write that makes a file larger than `size`.

    The write is carried out up to that byte; then SIGXFSZ ends the process as SIGKILL would.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    return script(name, argv)


def killed_after(pid: int, seconds: float) -> int:
    """Kill a process after some time; return its status, which may be that of its own end."""
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # not yet waited for: its number is still its own
    return finished(pid)


def _watch(holder: Any, name: str, moment: Callable[[str], None]) -> None:  # noqa: ANN401
    true = getattr(holder, name)

    def step(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        what = name
        if name == "fsync":
            target = Path(f"/proc/self/fd/{arguments[0]}").readlink()
            what = "fsync of folder" if target.is_dir() else "fsync of file"
        moment(f"before {what}")
        result = true(*arguments, **named)
        moment(f"after {what}")
        return result

    setattr(holder, name, step)
