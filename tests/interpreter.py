"""A stand-in for a project's `.venv/bin/python`, so that pages can run many commands of `make`.

A page has some twenty commands, and each of them would import torch again. Here a command of
scripts/, or a program on standard input (`python -`), is a client that asks the tests for a fork
(tests/processes.py), and takes over its output and its status. Everything else that a page starts
is Python itself.
"""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from tests.processes import ROOT, Process, Surroundings, start, start_program

__all__ = ["clone", "interpreter"]

# What a user's clone has, as far as a command of a page can touch it.
_FILES = ["Makefile", "config.ini", "constraints.txt", "pyproject.toml"]
_FOLDERS = ["examples", "lib", "schema", "scripts"]

_CLIENT = """#!{python} -ISE
import array, json, os, signal, socket, sys
script = sys.argv[1] if len(sys.argv) > 1 else ""
if script != "-" and not (script.startswith("scripts/") and os.path.isfile(script)):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
tests = socket.socket(socket.AF_UNIX)
tests.connect({address!r})
order = {{"argv": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
streams = array.array("i", [0, 1, 2])
tests.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
file = tests.makefile("rw")
print(json.dumps(order), file=file, flush=True)
pid = int(file.readline())
def hand_on(number, frame):
    os.kill(pid, number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, hand_on)
status = int(file.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def clone(folder: Path, interpreter: Path) -> None:
    """Make a folder what a clone is after `make setup`, with this environment as its .venv."""
    for name in _FILES:
        shutil.copy2(ROOT / name, folder / name)
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv, ours = folder / ".venv", Path(sys.prefix)
    (venv / "bin").mkdir(parents=True)
    for entry in [*ours.iterdir(), *(ours / "bin").iterdir()]:
        there = venv / entry.relative_to(ours)
        stamp = entry.name.startswith(".installed")
        if not stamp and not there.exists() and entry.name != "python":
            there.symlink_to(entry)
    (venv / "bin" / "python").symlink_to(interpreter)
    # In the order of make: what was installed later is newer.
    for name in [".installed", *(stamp.name for stamp in ours.glob(".installed-*"))]:
        (venv / name).touch()


@contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """Write the stand-in into `folder` and serve it; yields its path."""
    with socket.socket(socket.AF_UNIX) as listening:
        address = str(folder / "tests.socket")
        listening.bind(address)
        listening.listen()
        client = folder / "python"
        client.write_text(_CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        Thread(target=_accept, args=(listening,), daemon=True).start()
        yield client
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # closed
            return
        Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    """Run a script for a client, and tell it the process and the status."""
    with connection, connection.makefile("rw") as client:
        _, control, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        streams = array.array("i", control[0][2]).tolist()
        order = json.loads(client.readline())
        with _started(order, streams) as process:
            for stream in streams:
                os.close(stream)
            print(process.pid, file=client, flush=True)
            print(process.end().status, file=client, flush=True)


def _started(order: dict[str, Any], streams: list[int]) -> Process:
    path, *argv = order["argv"]
    folder = Path(order["folder"])
    prepare = partial(_stand_in, folder)
    into, out, err = streams
    surroundings: Surroundings = {
        "folder": folder, "environment": order["environment"], "into": into, "out": out, "err": err,
    }  # fmt: skip
    if path == "-":
        return start_program(None, *argv, prepare=prepare, **surroundings)
    return start(Path(path).stem, *argv, prepare=prepare, **surroundings)


def _stand_in(project: Path) -> None:
    """Let the settings of a copied project be those that its scripts find."""
    import lib.console.arguments
    import lib.settings

    for module in (lib.settings, lib.console.arguments):
        module.__dict__["DEFAULT_CONFIG"] = project / "config.ini"
