"""Contenders in processes of their own: each with its own allocator, start-up and peak memory.

What this project sets for its own process (huge pages) must not speed up a peer that ships
without it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Contender", "Spec", "peak_bytes"]

# What torch and oneDNN do by themselves, where lib sets something else.
_TORCHS_OWN = {
    "THP_MEM_ALLOC_ENABLE": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
    "LRU_CACHE_CAPACITY": "1024",
}


@dataclass(frozen=True)
class Spec:
    """Which contender (fair-esm, transformers, openvino, esm-ledger), on which weights, and how."""

    name: str
    weights: Path
    device: str
    dtype: str
    tokens_per_pack: int


class Contender:
    """A contender that waits for sequences in its own process; call it as `Embed`.

    `start_seconds` is from the start of the process to a model ready to compute: imports,
    detection, loading.
    """

    def __init__(self, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        start = time.perf_counter()
        with _environment_of(spec):
            self._process.start()
        theirs.close()
        self._connection.recv()
        self.start_seconds = time.perf_counter() - start

    def __call__(self, sequences: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Return (sequences, hidden_dim); raises EOFError if the process has died."""
        self._connection.send(list(sequences))
        vectors: npt.NDArray[np.float32] = self._connection.recv()
        return vectors

    def peak_bytes(self) -> int:
        """Return the largest resident size of the process so far."""
        self._connection.send(None)
        peak: int = self._connection.recv()
        return peak

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


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
    connection.send("ready")
    while True:
        try:
            asked = connection.recv()
        except EOFError:  # the other side closed: done
            return
        connection.send(peak_bytes() if asked is None else embed(asked))


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    # Not getrusage: its figure is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
