"""Version 1: the first tables, made whole by the program of that time."""

revision = "1"
down_revision = None


def upgrade() -> None:
    """Do nothing: this is where version-1 databases begin."""
