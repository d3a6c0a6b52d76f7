"""Processes: scripts that run apart from the tests and start in a hundredth of a second.

`python scripts/embed.py` imports torch for three seconds. A server (multiprocessing's forkserver)
imports everything once, and a script runs in a fork of it, as on the command line: with signals,
standard streams, folder, environment, arguments and an end of its own. What it patches dies with
it. Tests of the start itself (imports, environment, make) start Python.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any, TypedDict, Unpack

ROOT = Path(__file__).resolve().parent.parent
MOST_SECONDS = 300

Work = Callable[[], object]
# Where input comes from and output goes: a pipe, a file, or what is open under a number.
Stream = Path | int | None
PIPE = None
NOWHERE = Path(os.devnull)


@dataclass
class Answer:
    """What a script gave back; a negative status is the signal that killed it."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.out)


class Process:
    """A script that runs in a fork; as a context, killed at the end if it still lives.

    `out` and `err` are what it prints, None where that goes to a file.
    """

    def __init__(
        self, work: Work, order: _Order, into: Path | int, out: Stream, err: Stream
    ) -> None:
        forks = _forks()
        _, theirs_in = _ends(forks, into)
        self.out, theirs_out = _ends(forks, out)
        self.err, theirs_err = _ends(forks, err)
        streams = (theirs_in, theirs_out, theirs_err)
        self._process = forks.Process(target=_obey, args=(work, order, streams), daemon=True)
        self._process.start()
        for one in streams:
            one.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait_for(self, word: str) -> str:
        """Read stderr up to a line that ends with a word; return what was read."""
        assert self.err is not None
        said = ""
        for line in self.err:
            said += line
            if line.rstrip("\n").endswith(word):  # a bar may stand before it
                return said
        raise AssertionError(f"the script has ended without {word!r}: {said}")

    def end(self) -> Answer:
        """Wait for the end; return the status and what was not yet read."""
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(_rest, (self.out, self.err))
        self._process.join()
        assert self._process.exitcode is not None
        return Answer(self._process.exitcode, out, err)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        for stream in (self.out, self.err):
            if stream is not None:
                stream.close()


class Surroundings(TypedDict, total=False):
    """What a process begins with, where it is not what the tests have.

    folder: the project's if not given; environment: all of it. into, out, err: pipes for the last
    two if not given, and nothing to read.
    """

    folder: Path
    environment: Mapping[str, str]
    into: Path | int
    out: Stream
    err: Stream


def start(
    script: str,
    *argv: object,
    prepare: Work | None = None,
    **surroundings: Unpack[Surroundings],
) -> Process:
    """Start a script; `prepare` is called in its process before it, and may patch anything."""
    path = ROOT / "scripts" / f"{script}.py"
    return _started(partial(_run_script, script, prepare), path, *argv, **surroundings)


def run(
    script: str,
    *argv: object,
    prepare: Work | None = None,
    **surroundings: Unpack[Surroundings],
) -> Answer:
    """Run a script to its end; takes what `start` takes."""
    with start(script, *argv, prepare=prepare, **surroundings) as process:
        return process.end()


def start_function(work: Work, *argv: object, **surroundings: Unpack[Surroundings]) -> Process:
    """Call a function in a process of its own, `argv` being the arguments of its command line."""
    return _started(work, sys.executable, *argv, **surroundings)


def run_function(work: Work, *argv: object) -> Answer:
    """Call a function in a process of its own, and wait for its end."""
    with start_function(work, *argv) as process:
        return process.end()


def start_program(
    text: str | None,
    *argv: object,
    prepare: Work | None = None,
    **surroundings: Unpack[Surroundings],
) -> Process:
    """Run a program as `python -c` does, or one on stdin if None, as `python -` does.

    prepare: as in `start`.
    """
    return start_function(partial(_run_text, text, prepare), *argv, **surroundings)


def run_program(text: str, *argv: object, **surroundings: Unpack[Surroundings]) -> Answer:
    """Run a program to its end."""
    with start_program(text, *argv, **surroundings) as process:
        return process.end()


def _started(work: Work, *argv: object, **surroundings: Unpack[Surroundings]) -> Process:
    environment = dict(surroundings.get("environment", os.environ))
    order = _Order([*map(str, argv)], surroundings.get("folder", ROOT), environment)
    into, out = surroundings.get("into", NOWHERE), surroundings.get("out", PIPE)
    return Process(work, order, into, out, surroundings.get("err", PIPE))


# ---- What a script is made to do: called in its process, by way of `prepare`


def at_call(target: str, nth: int, do: Work, *, after: bool = False) -> None:
    """Call `do` at the nth call of a function (0: at all), before or after it.

    target: a module or a class of it, a dot, the function's name.
    """
    holder, name = pkgutil.resolve_name(target.rpartition(".")[0]), target.rpartition(".")[2]
    true, lock, calls = getattr(holder, name), threading.Lock(), 0

    def patched(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        nonlocal calls
        with lock:
            calls += 1
            due = nth in (0, calls)
        if due and not after:
            do()
        result = true(*arguments, **named)
        if due and after:
            do()
        return result

    setattr(holder, name, patched)


def die() -> None:
    """End as at a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size: int) -> None:
    """Let no file grow beyond so many bytes: as a quota, or a disk, says no."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def say(word: str) -> None:
    """Write a line to stderr for `Process.wait_for`, also from within a signal's handler."""
    os.write(2, f"{word}\n".encode())


def pause(gate: Path) -> None:
    """Say "reached" and wait until there is a file `gate`, as a slow function would."""
    say("reached")
    while not gate.exists():
        time.sleep(0.01)


def stop_at(target: str, nth: int, gate: Path) -> None:
    """Pause at the nth call of a function; say "received" when a signal was put off till later."""
    at_call(target, nth, partial(pause, gate))
    receive = "lib.jobs.interruption.Interruption._receive"
    at_call(receive, 0, partial(say, "received"), after=True)


# ---- The server and its forks


@dataclass(frozen=True)
class _Order:
    """What a process begins with."""

    argv: list[str]
    folder: Path
    environment: dict[str, str]


@cache
def _forks() -> ForkServerContext:
    """Start the server of this process of tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    # In the root, where `tests` is found; a fork must not find threads of numpy's.
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with chdir(ROOT):
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    if before is None:
        del os.environ["OPENBLAS_NUM_THREADS"]
    else:
        os.environ["OPENBLAS_NUM_THREADS"] = before
    assert first.exitcode == 0
    return context


def _obey(work: Work, order: _Order, streams: tuple[Connection, ...]) -> None:
    """Become the process that was asked for, and do its work."""
    signal.alarm(MOST_SECONDS)  # what hangs is ended, and told by its status
    # As from a terminal, though the tests may run in the background and ignore signals.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = os.fdopen(0, closefd=False)
    at_once = os.isatty(1) or "PYTHONUNBUFFERED" in order.environment
    sys.stdout.reconfigure(line_buffering=at_once)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    sys.argv = order.argv
    work()


def _run_script(name: str, prepare: Work | None) -> None:
    if prepare is None:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        # As a module, so that what is patched in it counts.
        module = import_module(f"scripts.{name}")
        prepare()
        module.run_script(module.main)


def _run_text(text: str | None, prepare: Work | None) -> None:
    sys.path.insert(0, "")  # as Python does
    if prepare is not None:
        prepare()
    exec(sys.stdin.read() if text is None else text, {"__name__": "__main__"})


def _ends(forks: ForkServerContext, stream: Stream) -> tuple[IO[str] | None, Connection]:
    """Return what the tests read a stream from, if it is a pipe, and what the process writes to.

    As connections, since multiprocessing hands those on to a process.
    """
    if stream is PIPE:
        reader, writer = forks.Pipe(duplex=False)
        ours = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()
        return ours, writer
    if isinstance(stream, int):
        return None, Connection(os.dup(stream))
    return None, Connection(os.open(stream, os.O_RDWR | os.O_CREAT))


def _rest(stream: IO[str] | None) -> str:
    return "" if stream is None else stream.read()
