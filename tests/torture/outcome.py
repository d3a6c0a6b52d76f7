"""What a series of trials showed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One line of the table: what was tried, how often, what happened, what was lost."""

    what: str
    trials: int
    happened: str
    lost: str  # "nothing" when good
