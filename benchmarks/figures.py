"""Figures: what a program in a Python of its own has measured, and on which machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

import torch

from lib.network.device import device_name

__all__ = ["figures_of", "this_machine"]


def figures_of(
    program: str, *argv: str, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run a program in a Python of its own; return the figures that its last line has as JSON.

    Raises RuntimeError with what the program said if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def this_machine() -> dict[str, str]:
    """Return when and where figures of a CPU are measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
