"""Actor: a worker as Ray runs it, a process that obeys the driver of a run.

Ray imports this module where it starts a worker. What takes long to import is imported later, so
that a worker says soon that it is there.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import LedgerError
from lib.jobs.messages import Answer, Failure, Greeting, Readiness, own_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from lib.jobs.worker import Order, Worker
    from lib.sequences.plan import Pack
    from lib.settings import Settings

__all__ = ["CONTROL", "Actor"]

CONTROL = "control"  # Ray's concurrency group of what is answered while a stretch is computed


class Actor:
    """The methods that a driver calls, one after another; `answer` and `stop` also in between.

    An exception in a constructor looks like a lost worker to the driver, so nothing is done there.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._stopped = threading.Event()

    def greet(self) -> Greeting:
        """Say that the worker is there, and with which libraries."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Greeting(socket.gethostname(), os.getpid(), node, own_versions())

    def load(self, settings: Settings) -> Readiness | Failure:
        """Take the digest of the weights and load them; `settings` name device and layers."""
        from lib.jobs.worker import Worker

        try:
            self._worker = Worker(settings)
        except LedgerError as error:
            return Failure.of(error)
        return self._worker.readiness

    def copy_nonce(self, nonce: Path, copy: Path) -> str | None:
        """Write what the driver wrote into a file beside it; return why that cannot be done."""
        try:
            with copy.open("xb") as file:
                file.write(nonce.read_bytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    def compute(
        self, order: Order, packs: Sequence[Pack]
    ) -> tuple[Answer, npt.NDArray[np.uint8] | None]:
        """Compute a stretch; return its bytes too if the file is to be sent."""
        assert self._worker is not None
        return self._worker.compute(order, packs, self._stopped.is_set)

    def answer(self) -> None:
        """Show that the process lives."""

    def stop(self) -> None:
        """Begin no pack any more."""
        self._stopped.set()
