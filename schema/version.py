"""Versions of the program and of its run database, and the mark of a run database."""

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION", "VERSION", "WRITER"]

VERSION = "0.1.0"  # of the program; pyproject.toml reads it here
WRITER = f"esm-ledger {VERSION}"  # as databases and checkpoint footers name the program

APPLICATION_ID = 0x45534D4C  # "ESML", as PRAGMA application_id shows it to file(1)
SCHEMA_VERSION = 3
