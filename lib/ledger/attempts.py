"""Attempts: what is recorded of a process that works at a run, before there is a row of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["AttemptFacts"]


@dataclass(frozen=True)
class AttemptFacts:
    """What is recorded of a process: everything that may differ between attempts at a run.

    attention: how it is computed, in words; empty if this process computes nothing.
    """

    weights_path: Path
    device: str
    device_name: str
    threads: int
    tokens_per_pack: int
    attention: str = ""
