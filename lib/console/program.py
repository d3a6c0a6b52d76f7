"""Programs: run the main function of a script and turn what it raises into an exit status."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from lib.console.output import note
from lib.console.streams import give_up_stdout, settle_streams
from lib.errors import OneLineError, SettingsError

__all__ = ["ctrl_c_within", "guarded", "run_script"]


def run_script(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run the main function of a script with the command line and exit with its status."""

    def begun(argv: Sequence[str] | None) -> int:
        # From here on Ctrl-C raises; scripts/_start.py has ended the process at once until now.
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(argv)

    settle_streams()
    try:
        sys.exit(guarded(begun, None))
    finally:
        give_up_stdout()


def guarded(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run the main function of a script and return its exit status.

    An error that a user can cause, or an interruption, becomes one line on stderr and its status.
    """
    try:
        _refuse_other_than_utf8(sys.argv[1:] if argv is None else argv)
        status = main(argv)
        sys.stdout.flush()
    except OneLineError as error:
        note(f"error: {error.shown}")
        return error.exit_status
    except UnicodeEncodeError as error:
        # Python reads what is not UTF-8 in a name of a file as half a letter, which cannot be
        # stored: here from another place than the command line, as the current folder.
        name = error.object[max(0, error.start - 100) : error.end + 100]
        note(f"error: {name!a}: not UTF-8")
        return SettingsError.exit_status
    except KeyboardInterrupt:
        note("error: SIGINT: interrupted")
        return 130
    except BrokenPipeError:  # nobody reads stdout any more, as behind `| head`
        return 4
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        note(f"error: {place}{error.strerror or error}")
        return 4
    except MemoryError:
        note("error: out of memory")
        return 4
    except Exception as error:
        if not _is_of_arrow(error):
            raise
        note(f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return 4
    return status


@contextmanager
def ctrl_c_within() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits some seconds for Ctrl-C, and returns whether it was pressed."""
    reading, writing = os.pipe()
    # Not KeyboardInterrupt, which is lost if it is raised within a destructor; nor an Event, whose
    # lock the code that the handler interrupts may hold.
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, _frame: os.write(writing, b"."))
    try:
        yield lambda seconds: bool(select.select([reading], [], [], seconds)[0])
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(reading)
        os.close(writing)


def _is_of_arrow(error: Exception) -> bool:
    """Return whether Arrow raised an error: of its limits, which data of any size can pass."""
    arrow = sys.modules.get("pyarrow")  # not imported for scripts that start without it
    return arrow is not None and isinstance(error, arrow.ArrowException)


def _refuse_other_than_utf8(argv: Sequence[str]) -> None:
    """Raise SettingsError for an argument that no database or JSON file can hold."""
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"argument {argument!a}: not UTF-8") from None
