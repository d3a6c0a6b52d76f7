"""The pipeline: packs go through the network several at a time and come out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from lib.columns import Vectors
from lib.errors import InputError, LedgerError, MachineError
from lib.network.device import packs_at_once
from lib.network.esm2 import Network
from lib.network.memory import available_bytes
from lib.network.vectors import Launched, NoRoomError, launch, needed_bytes
from lib.sequences.plan import Pack
from schema.parquet import VectorColumn

__all__ = ["StoppedError", "computed", "lanes"]

# A longer sequence keeps all threads busy by itself, and takes the memory of many packs.
_ALONE_TOKENS = 2048

_P = ParamSpec("_P")
_R = TypeVar("_R")


class StoppedError(Exception):
    """`computed` was told to stop and left packs that it had not begun."""


@dataclass(frozen=True)
class _OnWay:
    """A pack on its way.

    needed: bytes of memory; where: what computes it; launched: gives None if it was not begun.
    """

    pack: Pack
    needed: int
    where: Executor
    launched: Future[Launched | None]


def computed(
    network: Network,
    packs: Iterable[Pack],
    columns: Sequence[VectorColumn],
    per_tok_dtype: str,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Pack, Vectors]]:
    """Yield every pack with its vectors, in order; `packs` is read a few packs ahead.

    The bits of a pack do not depend on the packs beside it. Once `stopped` returns true, no pack
    is begun: those on their way are yielded, then StoppedError is raised. Raises what reading
    `packs`, `launch` and `collect` raise, after yielding the packs before the error. If the
    generator is closed early, packs on their way are abandoned at their next layer.
    """
    abandoned = threading.Event()

    def begin(pack: Pack) -> Launched | None:
        if stopped():
            return None
        return launch(network, pack.sequences, columns, per_tok_dtype, abandoned)

    def result(one: _OnWay) -> Launched | None:
        try:
            return one.launched.result()
        except NoRoomError:
            # It may have room once the packs beside it have ended.
            wait([other.launched for other in on_way])
            return one.where.submit(begin, one.pack).result()

    with lanes(network.device) as (executor, ahead):
        refused: list[LedgerError] = []
        on_way: deque[_OnWay] = deque()
        try:
            for pack in _until_refused(packs, refused):
                needed = needed_bytes(network, pack.sequences, columns)
                alone = _is_alone(pack, network.device)
                if alone or not _fits_beside(on_way, needed, network.device):
                    yield from _taken(on_way, 0, result)
                where = _Here() if alone else executor
                on_way.append(_OnWay(pack, needed, where, where.submit(begin, pack)))
                yield from _taken(on_way, 0 if alone else ahead, result)
            yield from _taken(on_way, 0, result)
            if refused:
                raise refused[0]
        finally:
            abandoned.set()


@contextmanager
def lanes(device: torch.device) -> Iterator[tuple[Executor, int]]:
    """Yield an executor that launches packs on a device, and how many to launch ahead.

    On a CPU, packs share the threads: two threads with a pack each wait less for each other than
    two threads in one operation. If the threads do not divide equally, packs go one at a time, so
    that the same number of threads computes a pack on every attempt. A GPU gets its next pack
    before the vectors of the last are read.
    """
    threads, count = torch.get_num_threads(), packs_at_once(device)
    if device.type == "cuda":
        yield _Here(), 1
    elif threads % count:
        yield _Here(), 0
    else:
        pool = ThreadPoolExecutor(
            count, initializer=torch.set_num_threads, initargs=(threads // count,)
        )
        try:
            yield pool, count  # one more pack waits in its queue, so that no thread idles
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # the initializer also set it for threads to come


class _Here(Executor):
    """Runs each call at once, in the thread that submits it."""

    def submit(self, fn: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_R]:
        future: Future[_R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except MachineError as error:  # reported in its turn; a signal ends everything at once
            future.set_exception(error)
        return future


def _until_refused(packs: Iterable[Pack], refused: list[LedgerError]) -> Iterator[Pack]:
    """Yield packs until reading them fails; append that error to `refused`."""
    try:
        yield from packs
    except (InputError, MachineError) as error:
        refused.append(error)


def _is_alone(pack: Pack, device: torch.device) -> bool:
    """Return whether a pack needs the machine to itself."""
    longest = max(len(sequence.residues) for sequence in pack.sequences)
    return device.type == "cpu" and longest + 2 > _ALONE_TOKENS


def _fits_beside(on_way: Collection[_OnWay], needed: int, device: torch.device) -> bool:
    """Return whether memory suffices for one more pack; if not even for one, `launch` halves it."""
    if device.type == "cuda" or not on_way:  # a GPU computes one pack at a time
        return True
    together = needed + sum(one.needed for one in on_way)
    available = available_bytes(device, together)
    return available is None or together <= available


def _taken(
    on_way: deque[_OnWay], left: int, result: Callable[[_OnWay], Launched | None]
) -> Iterator[tuple[Pack, Vectors]]:
    """Yield the oldest packs, waiting for the result of each, until `left` are on their way."""
    while len(on_way) > left:
        oldest = on_way.popleft()
        launched = result(oldest)
        if launched is None:
            raise StoppedError
        yield oldest.pack, launched.collect()
