"""Version 3: a run may have a label, and suspect records of its input are counted.

Nothing is filled in: what earlier versions did not count stays NULL.
"""

from __future__ import annotations

from alembic import op

revision = "3"
down_revision = "2"

_CHANGES = (
    "ALTER TABLE runs ADD COLUMN label VARCHAR /* what its user called it; NULL: nothing */",
    "ALTER TABLE runs ADD COLUMN records_nucleotide_like INTEGER"
    " /* records of nothing but A, C, G, T, U, N and gaps; NULL: not counted */",
    "ALTER TABLE runs ADD COLUMN records_with_gaps INTEGER"
    " /* records with gaps (- or .) as of an alignment; NULL: not counted */",
)


def upgrade() -> None:
    """Add the columns."""
    for change in _CHANGES:
        op.execute(change)
