"""Alembic's environment: migrates within the transaction of lib.ledger.migration, or not at all."""

from __future__ import annotations

from alembic import context

# SQLite changes tables within transactions; the one that is open spans all migrations.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
