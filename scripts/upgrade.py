"""Bring an older run database to the schema version of this program, after a backup beside it.

    python scripts/upgrade.py
    python scripts/upgrade.py --database runs.sqlite

Runs, checkpoints and files stay as they are; what an older version did not record stays empty.
Exit status: 0 upgraded, or of this version already, 2 no such database, or a newer one, 4 disk or
database failed.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, database_url
from lib.console.output import print_result
from lib.console.program import run_script
from lib.ledger.migration import upgrade
from schema.version import SCHEMA_VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Upgrade and say what was done."""
    parsed = arguments(__doc__).parse_args(argv)
    done = upgrade(database_url(parsed))
    line = f"database {done.path}: schema version {SCHEMA_VERSION} already"
    if done.backup is not None:
        line = (
            f"database {done.path}: schema version {done.before} brought to {SCHEMA_VERSION}, "
            f"backup in {done.backup}"
        )
    content = {
        "database": str(done.path),
        "before": done.before,
        "version": SCHEMA_VERSION,
        "backup": str(done.backup) if done.backup else None,
    }
    print_result(content, [line], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
