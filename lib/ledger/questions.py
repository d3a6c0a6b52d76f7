"""Questions that people ask of the run database, each with its query."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["Question", "questions"]

_QUESTION = re.compile(r"^-- ([^\n]+\?)\n(.*?);$", re.MULTILINE | re.DOTALL)


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
    text = files("schema").joinpath("questions.sql").read_text(encoding="utf-8")
    return [Question(question, sql) for question, sql in _QUESTION.findall(text)]
