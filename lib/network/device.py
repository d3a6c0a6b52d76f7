"""The device that computes: chosen, named, and its threads set."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from lib.errors import MachineError
from schema.settings import ComputeSettings

__all__ = [
    "choose_device",
    "choose_pack",
    "choose_precision",
    "device_name",
    "packs_at_once",
    "use_threads",
]

# On CPU more gains nothing, and two packs of the largest model still take less than 1 GB. On CUDA
# it is what fills the device at the width of the smaller models; it has not been measured.
_TOKENS_PER_PACK = {"cpu": 2048, "cuda": 32_768}
_PACKS_AT_ONCE = {"cpu": 2, "cuda": 1}


def choose_device(compute: ComputeSettings) -> tuple[torch.device, str]:
    """Return the device and why it was chosen; raises MachineError if it is not there."""
    if compute.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), "auto: CUDA is available"
        return torch.device("cpu"), "auto: no CUDA device"
    device = torch.device(compute.device)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index or 0
        if index >= count:
            raise MachineError(f"device {compute.device}: torch sees {count} CUDA devices")
        device = torch.device("cuda", index)
    return device, "as set"


def choose_precision(compute: ComputeSettings, device: torch.device) -> tuple[str, str]:
    """Return the type of matrix products (float32, bfloat16 or float16) and why it was chosen."""
    if compute.precision != "auto":
        return compute.precision, "as set"
    if device.type == "cuda":
        return "float16", "auto: float16 on CUDA"
    hint = ", but this CPU has bfloat16 units" if _has_bfloat16_units() else ""
    return "float32", f"auto: float32 on CPU{hint}"


def choose_pack(compute: ComputeSettings, device: torch.device) -> tuple[int, str]:
    """Return how many tokens go through the network at once, and why.

    The same on every attempt on such a device: it does not depend on what memory is free.
    """
    if compute.tokens_per_pack:
        return compute.tokens_per_pack, "as set"
    return _TOKENS_PER_PACK[device.type], f"auto: {device.type}"


def packs_at_once(device: torch.device) -> int:
    """Return how many packs are computed at once, if there are threads for it."""
    return _PACKS_AT_ONCE[device.type]


def device_name(device: torch.device) -> str:
    """Return what the processor calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def use_threads(compute: ComputeSettings) -> int:
    """Set torch's CPU threads if the settings say how many; return how many there are."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    return torch.get_num_threads()


def _has_bfloat16_units() -> bool:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in Linux's /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
