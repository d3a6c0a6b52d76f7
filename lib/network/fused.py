"""Fused attention on a CPU: the kernel of fused_attention.cpp, built once, and used if it can be.

A build stands in the Python environment. Its name has a digest of the source, the flags and
torch's version, so that none is loaded that was made from others.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lib.errors import MachineError
from lib.files import disk_errors, new_path
from lib.network.device import cpu_flags

__all__ = ["BY_TORCH", "FusedAttention", "build", "fused_attention"]

BY_TORCH = "by torch"

_SOURCE = Path(__file__).with_name("fused_attention.cpp")
_FLAGS = [
    *("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    *("-fopenmp", "-fPIC", "-shared"),
]
_NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # x86-64-v4, beyond v3


@dataclass(frozen=True)
class FusedAttention:
    """The loaded kernel; tiles: AMX computes the products of bfloat16."""

    tiles: bool

    def __call__(
        self, qkv: torch.Tensor, turns: torch.Tensor, bounds: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """Return the attended values, (rows, heads, head_dim), in the dtype of `qkv`.

        qkv: (T, 3, heads, head_dim) float32 or bfloat16; in queries and keys, the two numbers that
        turn together are neighbours. turns: (2, longest, head_dim), `lib.network.rotary`. bounds:
        (N + 1,) int32, the first token of each sequence, and the end. rows: T or more; those
        after T are zeros.
        """
        attended: torch.Tensor = torch.ops.esm_ledger.attend(qkv, turns, bounds, rows, self.tiles)
        return attended

    def __str__(self) -> str:
        return "fused, AMX" if self.tiles else "fused, AVX-512"


def fused_attention(device: torch.device, dtype: torch.dtype) -> FusedAttention | None:
    """Return the kernel for a device and a type of products; None if torch has to do its work."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not _loaded():
        return None
    return FusedAttention(tiles=dtype is torch.bfloat16 and _may_use_tiles())


def build() -> Path:
    """Compile the kernel for this Python's torch, unless it is there; return its path.

    Raises MachineError for a processor that it is not written for, and if there is no C++ compiler
    ($CXX, or c++) or it fails.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise MachineError(f"the kernel is for x86-64 Linux, this is {platform.platform()}")
    library = _library()
    if library.exists():
        return library
    wanted = os.environ.get("CXX", "c++")
    try:
        command = shlex.split(wanted)
    except ValueError as error:
        raise MachineError(f"CXX = {wanted}: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise MachineError(f"no C++ compiler: {command[0] if command else 'CXX is empty'}")
    with disk_errors(library.parent):
        library.parent.mkdir(parents=True, exist_ok=True)
    # Another process may have built the same meanwhile.
    with new_path(library, folder=False, replaceable=Path.is_file) as unfinished:
        _compile(command, unfinished)
    return library


def _compile(command: Sequence[str], to: Path) -> None:
    """Compile the kernel by a compiler and its options; raises MachineError if that fails."""
    torch_folder = Path(torch.__file__).parent
    with disk_errors(Path(command[0])):
        done = subprocess.run(
            [*command, *_FLAGS, str(_SOURCE), "-o", str(to),
             "-isystem", str(torch_folder / "include"),
             "-isystem", str(torch_folder / "include/torch/csrc/api/include"),
             f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    if done.returncode:
        raise MachineError(f"{command[0]}: exit status {done.returncode}: {_fact(done.stderr)}")


def _fact(output: str) -> str:
    """Return the first error of a compiler's output, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines[-1:] or ["no message"])[0][:300]


def _library() -> Path:
    made_from = hashlib.sha256(_SOURCE.read_bytes())
    made_from.update("\0".join([*_FLAGS, torch.__version__]).encode())
    folder = Path(sys.prefix) / "lib" / "esm-ledger"
    return folder / f"fused-attention-{made_from.hexdigest()[:16]}.so"


@cache
def _loaded() -> bool:
    """Load the kernel if it is built and this processor can run it."""
    if not cpu_flags() >= _NEEDED or not _library().exists():
        return False
    try:
        torch.ops.load_library(_library())  # type: ignore[no-untyped-call]
    except OSError:  # made on another system; torch computes the same
        return False
    return True


@cache
def _may_use_tiles() -> bool:
    allowed: bool = torch.ops.esm_ledger.may_use_tiles()
    return allowed
