"""Questions that people ask of the run database, each with the query that answers it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lib.ledger.statements import read_statements

__all__ = ["Question", "questions"]

# A field and its example, as schema/questions.sql has it: `{run: 1}`.
_FIELD = re.compile(r"\{(\w+): ([^}]*)\}")
_EQUATION = re.compile(r"(\w+) = ('?)\{(\w+): [^}]*\}\2")
_QUOTED = re.compile(r"'([^'{]*)\{(\w+): [^}]*\}([^']*)'")


@dataclass(frozen=True)
class Question:
    """A question in words, and the one SQL statement that answers it.

    template: that statement, with fields where it depends on what is asked about.
    """

    text: str
    template: str

    @property
    def name(self) -> str:
        """The question as the last part of an address: lower-case words and hyphens."""
        return "-".join(re.findall(r"[a-z0-9]+", self.text.lower()))

    @property
    def fields(self) -> dict[str, str]:
        """The example of each field, by name, in the order of the statement."""
        return dict(_FIELD.findall(self.template))

    @property
    def sql(self) -> str:
        """The statement with its examples."""
        return _FIELD.sub(r"\2", self.template)

    @property
    def form_sql(self) -> str:
        """The statement with a parameter for each field, as text.

        While a field is empty, a column may equal anything, a text may hold anything, and a number
        is 0.
        """
        sql = _EQUATION.sub(r"(:\3 = '' OR \1 = :\3)", self.template)
        sql = _QUOTED.sub(lambda found: _joined(*found.groups()), sql)
        return _FIELD.sub(r"CAST(:\1 AS INTEGER)", sql)


def questions() -> list[Question]:
    """Return the questions of schema/questions.sql in their order."""
    return [Question(" ".join(one.comments), one.sql) for one in read_statements("questions.sql")]


def _joined(before: str, name: str, after: str) -> str:
    """Return the SQL of a text with a parameter in it."""
    parts = [f"'{before}'" if before else "", f":{name}", f"'{after}'" if after else ""]
    return " || ".join(part for part in parts if part)
