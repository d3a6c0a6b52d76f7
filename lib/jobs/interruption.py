"""Interruption: signals that end the work, at once or as soon as what is finished is committed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lib.errors import InterruptedRunError

__all__ = ["Interruption"]

_Handler = Callable[[int, FrameType | None], object] | signal.Handlers
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Turns SIGINT, SIGTERM and SIGHUP into an InterruptedRunError, unless they are to be ignored.

    Within `deferred()` the first signal only sets `requested`; a second one raises at once, and
    sets `insisted` for who calls code in which exceptions are lost.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.insisted = False
        self._deferring = False
        self._handlers: dict[signal.Signals, _Handler] = {}

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals until the end of the block.

        What this process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the
        background of a script.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handlers = {
            number: handler if handler is signal.SIG_IGN else self._receive
            for number, handler in before.items()
        }
        self.handle_again()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_again(self) -> None:
        """Handle the signals again after a library has set handlers of its own.

        Python lets only the main thread do that; libraries do it in no other either.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block look at `requested` at moments of its own choice."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def error(self, fact: str, run_id: int | None = None) -> InterruptedRunError:
        """Return the error that ends the work with the exit status of the signal received.

        run_id: the run that can be continued, if there is one.
        """
        assert self.requested is not None
        return InterruptedRunError(f"{self.requested.name}: {fact}", self.requested, run_id)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        first = self.requested is None
        self.requested = signal.Signals(number)
        if not (self._deferring and first):
            self.insisted = True
            raise self.error("interrupted")
