"""What every script imports first: from here on, Ctrl-C or a missing package is one line.

A script that is run by its path finds this module beside it, with any Python. Nothing is imported
here that a Python may lack. When `main` begins, lib/console/program.py takes over.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

_SCRIPTS = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (older Pythons too)
_OURS = ("lib", "schema", "scripts", "benchmarks")


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    # Not KeyboardInterrupt: an import that is under way may turn it into anything else.
    try:
        os.write(2, b"error: SIGINT: interrupted\n")
    finally:  # also if Ctrl-C has ended the reader of stderr before
        os._exit(130)


def _not_imported(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    name = error.name or "" if isinstance(error, ImportError) else ""
    if not isinstance(error, ImportError) or name.split(".")[0] in _OURS:
        sys.__excepthook__(kind, error, traceback)
        return
    missing = isinstance(error, ModuleNotFoundError)
    fact = f"no package {name}" if missing else " ".join(str(error).split())
    sys.stderr.write(f"error: {sys.executable}: {fact} (make setup installs .venv/bin/python)\n")
    sys.exit(4)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
    signal.signal(signal.SIGINT, _interrupted)
sys.excepthook = _not_imported
if sys.path[0] == _SCRIPTS:  # the project that the script is of, and no script under its own name
    sys.path[0] = os.path.dirname(_SCRIPTS)  # noqa: PTH120
