"""Memory: what a pack needs and what a device has left, compared before a pack is begun.

Linux hands out memory that it does not have, and kills the process that uses it. So it is too late
to wait for an allocation to fail.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from lib.errors import MachineError
from lib.network.cgroups import memory_left
from lib.network.contacts import BLOCK_BYTES

__all__ = [
    "available_bytes",
    "contact_bytes",
    "device_errors",
    "give_back",
    "kept_bytes",
    "pack_bytes",
    "ran_out",
]

# Largest number of (tokens, hidden_dim) float32 arrays that are alive at once in the network: in
# the feed-forward layer its input, its norm and its inner array, 4 times as wide, which is there
# twice where GELU is a step of its own. In attention there are 8: q, k, v and their copies.
_ARRAYS_ALIVE = 10
# glibc gives freed arrays back to the system only beyond its threshold for mmap, which grows up to
# 32 MB. Of smaller ones a thread keeps a few, and how many depends on the addresses that the system
# gave its heap: the same pack, alone, took the place of 9 to 13 arrays in 14 processes. Of packs of
# models 160 to 5,120 wide, one took that of 18, with what products keep.
_GIVEN_BACK_BYTES = 32 * 1024 * 1024
_ARRAYS_KEPT = 9
# What matrix products keep for themselves: beside so many small arrays, 5 MB were measured, and in
# one process of forty 10 MB.
_SCRATCH_BYTES = 12 * 1024 * 1024
# In plain RuntimeErrors: of torch on a CPU, of oneDNN, C++, the system, CUDA, cuBLAS and cuDNN.
_LACKS_MEMORY = (
    "could not create a primitive",
    "std::bad_alloc",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)
# How errors of a GPU begin that are plain RuntimeErrors, too.
_OF_A_GPU = ("CUDA error", "CUDA driver", "cuDNN error", "cuBLAS error", "Found no NVIDIA driver")


def pack_bytes(tokens: int, hidden_dim: int) -> int:
    """Return an upper estimate of the bytes that a pack takes beside the weights."""
    array = 4 * tokens * hidden_dim
    arrays = _ARRAYS_ALIVE + (_ARRAYS_KEPT if array <= _GIVEN_BACK_BYTES else 0)
    return _SCRATCH_BYTES + array * arrays


def kept_bytes(tokens: int, hidden_dim: int, layers: int, device: torch.device) -> int:
    """Return an upper estimate of what vectors of all tokens take in the memory of the CPU.

    layers: of which they are kept until the checkpoint has them.
    """
    # As arrays, and again as the rows of a Parquet file. What comes from a GPU is page-locked, for
    # which torch takes a power of two.
    return (4 if device.type == "cuda" else 3) * layers * 4 * tokens * hidden_dim


def contact_bytes(lengths: Sequence[int]) -> int:
    """Return an upper estimate of the bytes that contacts of a pack take beside `pack_bytes`.

    lengths: (N,) residues per sequence.
    """
    longest = max(BLOCK_BYTES, 4 * (max(lengths) + 2) ** 2)
    # A block of attention is in memory as scores, as probabilities, and twice while it is summed;
    # contacts as sums, as probabilities, and as the rows of a Parquet file.
    return 4 * longest + 5 * sum(4 * residues**2 for residues in lengths)


def available_bytes(device: torch.device, wanted: int = 0, *, at_most: bool = False) -> int | None:
    """Return the bytes of memory left on `device`, or None if the system does not tell.

    On a CPU that is the least of what the machine, control groups and `ulimit -v` leave. If it is
    less than `wanted`, memory that this process has freed is given back to the system first.
    at_most: counting half of the page cache of control groups that is in use, as code is.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(reserved)
    left = _left(at_most=at_most)
    if left is not None and left < wanted:
        give_back()
        left = _left(at_most=at_most)
    return left


def give_back() -> None:
    """Give back to the system what Arrow keeps of freed memory, and malloc, where it is glibc's."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def ran_out(error: Exception) -> bool:
    """Return whether an error reports lack of memory, and not another fault of memory."""
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or any(fact in str(error) for fact in _LACKS_MEMORY)


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what a GPU reports into a MachineError, but lack of memory, which others handle."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, torch.AcceleratorError) or str(error).startswith(_OF_A_GPU)
        if ran_out(error) or not known:
            raise
        fact = " ".join(str(error).partition("\n")[0].split())[:300]
        raise MachineError(f"{device}: {fact}") from None


def _left(*, at_most: bool) -> int | None:
    """Return the least of what the machine, control groups and `ulimit -v` leave this process."""
    ways = _meminfo_available(), memory_left(at_most=at_most), _address_space_left()
    return min((left for left in ways if left is not None), default=None)


def _address_space_left() -> int | None:
    limit, _hard = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return None
    return max(0, limit - pages * resource.getpagesize())


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None
