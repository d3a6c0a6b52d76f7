"""Comments: what the schema says about its tables, views and columns."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from importlib.resources import files

from schema.tables import Base

__all__ = ["Comment", "table_comments", "view_comments"]

_VIEW = re.compile(r"^-- ([^\n]+)\nCREATE VIEW (\w+) AS\n(.*?);$", re.MULTILINE | re.DOTALL)
_COLUMN = re.compile(r"^    -- ([^\n]+)\n.*?\bAS (\w+),?$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Comment:
    """What the rows of a table or view are, and what each column holds."""

    rows: str
    columns: dict[str, str]


def table_comments() -> dict[str, Comment]:
    """Return the comment of every table by name, columns in their order."""
    classes = [mapper.class_ for mapper in Base.registry.mappers]
    return {
        one.__tablename__: Comment(
            inspect.getdoc(one) or "",
            {column.name: column.comment or "" for column in one.__table__.columns},
        )
        for one in classes
    }


def view_comments() -> dict[str, Comment]:
    """Return the comment of every view by name, columns in their order."""
    text = files("schema").joinpath("views.sql").read_text(encoding="utf-8")
    return {
        name: Comment(rows, {column: comment for comment, column in _COLUMN.findall(body)})
        for rows, name, body in _VIEW.findall(text)
    }
