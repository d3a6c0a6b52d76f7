"""Contenders in processes of their own: each with its own allocator, start-up and peak memory.

What this project sets for its own process (huge pages) must not speed up a peer that ships
without it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.errors import MachineError

__all__ = ["Contender", "Spec", "answer", "peak_bytes"]

# What torch and oneDNN do by themselves, where lib sets something else.
_TORCHS_OWN = {
    "THP_MEM_ALLOC_ENABLE": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
    "LRU_CACHE_CAPACITY": "1024",
}


@dataclass(frozen=True)
class Spec:
    """Which contender, on which weights, and how.

    name: fair-esm, transformers, openvino, esm-cpp or esm-ledger.
    """

    name: str
    weights: Path
    device: str
    dtype: str
    tokens_per_pack: int


class Contender:
    """A contender that waits for sequences in its own process; call it as `Embed`.

    `start_seconds` is from the start of the process to a model ready to compute: imports,
    detection, loading. Raises MachineError if its Python is missing or ends early.
    """

    def __init__(self, spec: Spec) -> None:
        start = time.perf_counter()
        with _environment_of(spec):
            self._connection, self._wait = _start(spec)
        try:
            self._connection.recv()
        except EOFError:
            self.close()
            raise MachineError(f"{spec.name} {spec.dtype}: its process ended early") from None
        self.start_seconds = time.perf_counter() - start

    def __call__(self, sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Return (sequences, hidden_dim); raises EOFError if the process has died."""
        return self._asked("embed", sequences)

    def vectors(self, sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Return (sequences, hidden_dim) of a contender that gives logits when it is called."""
        return self._asked("vectors", sequences)

    def peak_bytes(self) -> int:
        """Return the largest resident size of the process so far."""
        self._connection.send(("peak", None))
        peak: int = self._connection.recv()
        return peak

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._wait()

    def _asked(self, what: str, sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        self._connection.send((what, list(sequences)))
        # As bytes: an array that one numpy has pickled need not be read by another.
        found = np.frombuffer(self._connection.recv(), np.float32)
        return found.reshape(len(sequences), -1)


def _start(spec: Spec) -> tuple[Connection, Callable[[], object]]:
    """Start the process of a contender; return a connection to it, and what waits for its end."""
    if spec.name == "esm-cpp":
        return _start_esm_cpp(spec)
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
    process.start()
    theirs.close()
    return connection, process.join


def _start_esm_cpp(spec: Spec) -> tuple[Connection, Callable[[], object]]:
    from benchmarks import esm_cpp

    if not esm_cpp.PYTHON.exists():
        raise MachineError(f"{esm_cpp.PYTHON}: no such file")
    connection, theirs = multiprocessing.Pipe()
    handle = theirs.fileno()
    process = subprocess.Popen(
        esm_cpp.command(handle, spec.weights, spec.dtype),
        cwd=esm_cpp.ENVIRONMENT.parent,
        pass_fds=[handle],
    )
    theirs.close()
    return connection, process.wait


@contextmanager
def _environment_of(spec: Spec) -> Iterator[None]:
    """Hand a process the settings of torch that it has when it is started by itself."""
    before = {name: os.environ.get(name) for name in _TORCHS_OWN}
    if spec.name != "esm-ledger":  # whose settings lib has made in this process already
        os.environ.update(_TORCHS_OWN)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, spec: Spec) -> None:
    import torch

    from benchmarks.contenders import fair_esm, openvino, ours, transformers_sdpa
    from lib.models.detection import detect
    from lib.settings import load_settings

    found = detect(load_settings(overrides={"model.esm_model": str(spec.weights)}).model)
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    if spec.name == "fair-esm":
        embed = fair_esm(found, device)
    elif spec.name == "transformers":
        embed = transformers_sdpa(found, device, dtype)
    elif spec.name == "openvino":
        embed = openvino(found, dtype)
    else:
        embed = ours(found, device, dtype, spec.tokens_per_pack)
    answer(connection, {"embed": embed})


def answer(connection: Connection, contender: Mapping[str, Callable[[list[bytes]], Any]]) -> None:
    """Say that a contender is ready and answer what it is asked, until the other side closes.

    contender: what each question calls with the sequences; it returns a float32 array.
    """
    connection.send("ready")
    while True:
        try:
            what, sequences = connection.recv()
        except EOFError:  # the other side closed: done
            return
        if what == "peak":
            connection.send(peak_bytes())
        else:
            connection.send(np.ascontiguousarray(contender[what](sequences)).tobytes())


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    # Not getrusage: its figure is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
