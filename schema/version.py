"""What marks a SQLite file as a run database, and as one of this version."""

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION"]

APPLICATION_ID = 0x45534D4C  # "ESML", as PRAGMA application_id shows it to file(1)
SCHEMA_VERSION = 1
