"""The device that computes: its choice, its name, its precision, packs and threads."""

from __future__ import annotations

import platform
import warnings
from functools import cache
from pathlib import Path
from timeit import repeat

import torch

from lib.errors import MachineError
from schema.settings import ComputeSettings

__all__ = [
    "choose_device",
    "choose_pack",
    "choose_precision",
    "cpu_flags",
    "cpu_vendor",
    "device_name",
    "packs_at_once",
    "sent",
    "use_threads",
]

# On CPU larger packs are not faster, and two packs of the largest model take less than 1 GB. On
# CUDA this fills the device at the width of the smaller models; nobody has measured it.
_TOKENS_PER_PACK = {"cpu": 2048, "cuda": 32_768}
_PACKS_AT_ONCE = {"cpu": 2, "cuda": 1}


def choose_device(compute: ComputeSettings) -> tuple[torch.device, str]:
    """Return the device and why it was chosen; raises MachineError if there is none."""
    if compute.device == "cpu":
        return torch.device("cpu"), "as set"
    complaint = _complaint()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if compute.device == "auto":
        if not count:
            return torch.device("cpu"), f"auto: no CUDA device{complaint}"
        others = f", 1 of {count} devices ([cluster] ray = auto uses all)" if count > 1 else ""
        return torch.device("cuda", 0), f"auto: CUDA is available{others}"
    index = torch.device(compute.device).index or 0
    if index >= count:
        raise MachineError(f"device {compute.device}: torch sees {count} CUDA devices{complaint}")
    return torch.device("cuda", index), "as set"


def choose_precision(compute: ComputeSettings, device: torch.device) -> tuple[str, str]:
    """Return the dtype of matrix products (float32, bfloat16 or float16) and why it was chosen."""
    if compute.precision != "auto":
        return compute.precision, "as set"
    if device.type == "cuda":
        return "float16", "auto: float16 on CUDA"
    hint = ", but this CPU is faster in bfloat16" if _bfloat16_is_faster() else ""
    return "float32", f"auto: float32 on CPU{hint}"


def choose_pack(compute: ComputeSettings, device: torch.device) -> tuple[int, str]:
    """Return the largest number of tokens in a pack, and why it was chosen.

    It depends on the kind of device and not on free memory, so every attempt has the same packs.
    """
    if compute.tokens_per_pack:
        return compute.tokens_per_pack, "as set"
    return _TOKENS_PER_PACK[device.type], f"auto: {device.type}"


def packs_at_once(device: torch.device) -> int:
    """Return how many packs the device computes at once if its threads divide equally."""
    return _PACKS_AT_ONCE[device.type]


def device_name(device: torch.device) -> str:
    """Return the name that the processor reports."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on the device; CUDA fetches it while the host goes on."""
    pinned = host.pin_memory() if device.type == "cuda" else host
    return pinned.to(device, non_blocking=True)


def use_threads(compute: ComputeSettings) -> int:
    """Set the number of torch's CPU threads if the settings give one; return the number in use."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    return torch.get_num_threads()


def cpu_flags() -> frozenset[str]:
    """Return what the processor can do, by the names of Linux's /proc/cpuinfo."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def cpu_vendor() -> str:
    """Return who made the processor, by the names of Linux's /proc/cpuinfo; empty elsewhere."""
    return _cpuinfo("vendor_id")


@cache
def _complaint() -> str:
    """Return what torch says of a GPU that it cannot use, as of a driver that is too old for it.

    It says so once in a process, as a warning.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    facts = [" ".join(str(one.message).split()).partition(" Please ")[0] for one in said]
    return "".join(f"; {fact[:300]}" for fact in facts)


@cache
def _bfloat16_is_faster() -> bool:
    """Return whether products of bfloat16 take less than 2/3 of the time of those of float32.

    Units alone do not tell: with avx512_bf16 and without AMX, one processor takes twice the time.
    """
    if cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}):
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_seconds(torch.bfloat16) < 2 / 3 * _product_seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest of five times that a product took; all of them take some milliseconds."""
    x = torch.ones(384, 384, dtype=dtype)
    return min(repeat(lambda: torch.mm(x, x), number=1, repeat=5))


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in Linux's /proc/cpuinfo, or an empty text."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
