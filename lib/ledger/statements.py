"""Statements: the SQL files of schema/, cut into statements with the comments above them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["Statement", "parse_statements", "read_statements"]

# In a view: a comment on a line of its own, then an expression that ends a line with its name.
_COLUMN = re.compile(r"^ *-- ([^\n]+)\n.*?\bAS (\w+),?$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """One SQL statement without its semicolon, and the comment lines directly above it."""

    comments: tuple[str, ...]
    sql: str

    @property
    def columns(self) -> dict[str, str]:
        """The comment of every column that the statement names with AS and explains."""
        return {name: comment for comment, name in _COLUMN.findall(self.sql)}


def read_statements(name: str) -> list[Statement]:
    """Return the statements of the file `name` in schema/, in their order."""
    return parse_statements(files("schema").joinpath(name).read_text(encoding="utf-8"))


def parse_statements(text: str) -> list[Statement]:
    """Return the statements of a text in their order.

    A statement ends with a semicolon at the end of a line. A blank line separates the comments
    of a statement from earlier ones, such as those about the whole file.
    """
    comments: list[str] = []
    statement: list[str] = []
    found = []
    for line in text.splitlines():
        if statement or (line.strip() and not line.startswith("--")):
            statement.append(line)
            if line.endswith(";") and not line.lstrip().startswith("--"):
                found.append(Statement(tuple(comments), "\n".join(statement).removesuffix(";")))
                comments, statement = [], []
        elif line.startswith("--"):
            comments.append(line.removeprefix("--").strip())
        else:
            comments = []
    return found
