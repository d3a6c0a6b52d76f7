"""Browser: the run database in a web browser, read-only, by Datasette (0.65)."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lib.errors import LedgerError, SettingsError
from lib.ledger.comments import table_comments, view_comments
from lib.ledger.questions import questions
from lib.ledger.sqlite_file import connect_read_only, database_path
from lib.pages.loopback import App

__all__ = ["START_PAGE", "browser_app", "page_metadata"]

# Datasette's name of the database, whatever its file is called.
_NAME = "runs"
START_PAGE = f"/{_NAME}"
_SETTINGS = {
    "allow_download": False,  # a copy of the file would lack what is still in its -wal
    "default_cache_ttl": 0,  # runs progress while people look at them
    "sql_time_limit_ms": 10_000,
    "facet_suggest_time_limit_ms": 20,
}
# The explanations of the columns stand above the rows; side by side they leave the rows in sight.
# On a telephone, queries, digests and paths are broken where they have to be, so that nothing
# sticks out.
_STYLE = """
dl.column-descriptions{columns:24em} dl.column-descriptions dt{break-after:avoid}
#sql-query{white-space:pre-wrap} #sql-query,h1,.rows-and-columns td{overflow-wrap:anywhere}
form.sql label{width:auto;min-width:5em} form.sql input[type=text]{max-width:100%}
"""


def browser_app(url: str) -> App:
    """Return the ASGI app that shows a run database.

    Raises SettingsError if it does not exist, is another program's, or Datasette is not installed.
    """
    path = database_path(url)
    connect_read_only(path).close()
    try:
        from datasette.app import Datasette
    except ImportError as error:
        raise SettingsError(f"browse: {error.name} is not installed") from None
    _choose_plugins()
    app = Datasette(memory=False, metadata=page_metadata(path), settings=_SETTINGS)
    app.remove_database("_memory")
    app.add_database(_read_only_database(app, path), name=_NAME)
    made: App = app.app()
    return made


def page_metadata(path: Path) -> dict[str, Any]:
    """Return Datasette's metadata: a page per question, and the comments of tables and columns."""
    comments = table_comments() | view_comments()
    tables: dict[str, dict[str, Any]] = {
        name: {"description": comment.rows, "columns": comment.columns}
        for name, comment in comments.items()
    }
    for name in table_comments().keys() - {"schema_version"}:
        tables[name]["sort_desc"] = "id"
    for name in ("schema_version", "sqlite_sequence"):
        tables.setdefault(name, {})["hidden"] = True
    pages = {
        one.name: {"title": one.text, "sql": one.form_sql, "params": [*one.fields]}
        for one in questions()
    }
    about = {"title": "esm-ledger", "description": f"{path} (read-only)"}
    return {
        **about,
        "extra_css_urls": [f"data:text/css,{quote(_STYLE)}"],
        "databases": {_NAME: {**about, "tables": tables, "queries": pages}},
    }


def _choose_plugins() -> None:
    """Unload all plugins but Datasette's own, and show errors of the database as one line."""
    from datasette import handle_exception as usual
    from datasette import hookimpl
    from datasette.plugins import DEFAULT_PLUGINS, pm
    from datasette.views.base import DatasetteError

    class ErrorPages:
        @staticmethod
        @hookimpl  # type: ignore[untyped-decorator]
        def handle_exception(datasette: object, request: object, exception: Exception) -> object:
            if isinstance(exception, LedgerError | sqlite3.Error):
                # Datasette prints a traceback of any error it does not know.
                exception = DatasetteError(str(exception), status=500)
            return usual.handle_exception(datasette, request, exception)

    # Plugins that happen to be installed may write, upload or serve files.
    kept = set(DEFAULT_PLUGINS) - {usual.__name__}
    for plugin in pm.get_plugins():
        if pm.get_name(plugin) not in kept:
            pm.unregister(plugin)
    # If rich is installed, Datasette prints a traceback for every address that does not exist.
    usual.rich = None
    pm.register(ErrorPages)


def _read_only_database(app: Any, path: Path) -> Any:  # noqa: ANN401 (Datasette has no types)
    from datasette.database import Database

    class ReadOnlyDatabase(Database):  # type: ignore[misc]
        """Opens the file again for every query.

        So no reader holds up the writer's WAL checkpoints, and a file that has replaced the
        first one is seen.
        """

        async def execute_fn(self, fn: Callable[[sqlite3.Connection], object]) -> object:
            def read() -> object:
                with closing(connect_read_only(path)) as connection:
                    self.ds._prepare_connection(connection, self.name)
                    return fn(connection)

            return await asyncio.get_running_loop().run_in_executor(self.ds.executor, read)

    return ReadOnlyDatabase(app, path=str(path))
