"""The device that computes: chosen, named, and its threads set."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from lib.errors import MachineError
from schema.settings import ComputeSettings

__all__ = ["choose_device", "device_name", "use_threads"]


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


def device_name(device: torch.device) -> str:
    """Return what the processor calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def use_threads(compute: ComputeSettings) -> int:
    """Set torch's CPU threads if the settings say how many; return how many there are."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    return torch.get_num_threads()
