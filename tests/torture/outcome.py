"""What a part of the torture tried, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One row of the table: what was tried how often, what happened, what was lost."""

    what: str
    trials: int
    happened: str
    lost: str
