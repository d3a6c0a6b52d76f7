"""Migrations of the run database, run by Alembic through lib.ledger.migration."""
