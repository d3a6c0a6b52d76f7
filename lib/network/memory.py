"""Memory: what a pack needs, and what a device has left, asked before it is taken.

Linux hands out memory that it does not have and kills the process that uses it: a failed
allocation is not to be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lib.network.contacts import BLOCK_BYTES

__all__ = ["available_bytes", "contact_bytes", "pack_bytes", "ran_out"]

# Largest number of (tokens, hidden_dim) float32 arrays that are alive at once in the network: in
# the feed-forward its input and norm and the 4-wide inner one, in attention q, k, v and copies.
_ARRAYS_ALIVE = 10
# Limit and use of the control group that this process is in, version 2 and version 1.
_CGROUPS = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
]


def pack_bytes(tokens: int, hidden_dim: int, kept_layers: int) -> int:
    """Return an upper estimate of what a pack of `tokens` tokens takes beside the weights.

    kept_layers: how many layers' per-token vectors are kept until the checkpoint has them.
    """
    # What is kept lies once as arrays and once as the rows of a Parquet file.
    return 4 * tokens * hidden_dim * (_ARRAYS_ALIVE + 3 * kept_layers)


def contact_bytes(lengths: Sequence[int]) -> int:
    """Return an upper estimate of what the contacts of a pack take beside `pack_bytes`.

    lengths: (N,) residues per sequence.
    """
    longest = max(BLOCK_BYTES, 4 * (max(lengths) + 2) ** 2)
    # A block of attention as scores, as probabilities and twice while it is summed up; contacts
    # as sums, as probabilities, and as the rows of a Parquet file.
    return 4 * longest + 5 * sum(4 * residues**2 for residues in lengths)


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is left on `device`, or None where nothing tells."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(reserved)
    limits = [_meminfo_available(), _cgroup_available()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def ran_out(error: Exception) -> bool:
    """Return whether an error is memory's: torch has plain RuntimeErrors for it."""
    return isinstance(error, MemoryError) or "memory" in str(error)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def _cgroup_available() -> int | None:
    for limit, used in _CGROUPS:
        try:
            left = int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))
        except (OSError, ValueError):  # not this version, or "max": no limit
            continue
        return max(0, left)
    return None
