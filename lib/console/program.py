"""Programs: run the main function of a script and turn what it raises into an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lib.console.output import note
from lib.errors import LedgerError

__all__ = ["guarded", "run_script"]


def run_script(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run the main function of a script with the command line and exit with its status."""
    sys.exit(guarded(main, None))


def guarded(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run the main function of a script and return its exit status.

    An error that a user can cause becomes one line on stderr and its status.
    """
    try:
        status = main(argv)
        sys.stdout.flush()
    except LedgerError as error:
        note(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        note("error: SIGINT: interrupted")
        return 130
    except BrokenPipeError:
        # Nobody reads stdout any more: keep Python from flushing to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 4
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        note(f"error: {place}{error.strerror or error}")
        return 4
    except MemoryError:
        note("error: out of memory")
        return 4
    return status
