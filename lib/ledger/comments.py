"""Comments: what the schema says about its tables, views and columns."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from lib.ledger.statements import read_statements
from schema.tables import Base

__all__ = ["Comment", "table_comments", "view_comments"]

_VIEW = re.compile(r"CREATE VIEW (\w+)")


@dataclass(frozen=True)
class Comment:
    """A line about the rows of a table or view, and one about each of its columns."""

    rows: str
    columns: dict[str, str]


def table_comments() -> dict[str, Comment]:
    """Return the comment of every table by name, with its columns in their order."""
    classes = [mapper.class_ for mapper in Base.registry.mappers]
    return {
        one.__tablename__: Comment(
            inspect.getdoc(one) or "",
            {column.name: column.comment or "" for column in one.__table__.columns},
        )
        for one in classes
    }


def view_comments() -> dict[str, Comment]:
    """Return the comment of every view by name, with its columns in their order."""
    comments = {}
    for statement in read_statements("views.sql"):
        view = _VIEW.match(statement.sql)
        if view is not None:
            comments[view[1]] = Comment(" ".join(statement.comments), statement.columns)
    return comments
