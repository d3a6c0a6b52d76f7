"""Questions that people ask of the run database, each with the query that answers it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lib.ledger.statements import read_statements

__all__ = ["Question", "questions"]


@dataclass(frozen=True)
class Question:
    """A question in words, and the one SQL statement that answers it."""

    text: str
    sql: str

    @property
    def name(self) -> str:
        """The question as the last part of an address: lower-case words and hyphens."""
        return "-".join(re.findall(r"[a-z0-9]+", self.text.lower()))


def questions() -> list[Question]:
    """Return the questions of schema/questions.sql in their order."""
    return [Question(" ".join(one.comments), one.sql) for one in read_statements("questions.sql")]
