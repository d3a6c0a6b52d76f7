"""Make a lost run database anew from the footers of checkpoint files.

    python scripts/rebuild.py --output embeddings
    python scripts/rebuild.py --output embeddings --database new.sqlite

Every file of every run folder in --output is read to its end: page checksums, columns, footer.
Runs, inputs and checkpoints go on record with their numbers; an unfinished run can be resumed. A
run that is on record, by uuid or number, is left alone, so it can be run again. What no footer
knows is said: attempts, machines, library versions, when a run ended. Files of some early
runs lack totals, which are then counted in the input. Exit status: 0 all of it rebuilt, 2 no
checkpoint file there, 3 some of it not, 4 disk or database failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, overrides, settings_arguments
from lib.console.output import note, print_json, print_line
from lib.console.program import run_script
from lib.ledger.rebuilding import NOT_KNOWN, rebuild
from lib.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild and print what went on record, folder by folder."""
    parser = arguments(__doc__)
    settings_arguments(parser, "output")
    parsed = parser.parse_args(argv)
    settings = load_settings(parsed.config, overrides(parsed))
    done = []
    for one in rebuild(settings.database.url, Path(settings.output.folder), note):
        done.append(one)
        if not parsed.json:
            print_line("\n".join(one.describe()))
    if parsed.json:
        print_json([asdict(one) | {"folder": str(one.folder)} for one in done])
    elif any(one.run is not None for one in done):
        print_line(NOT_KNOWN)
    return 3 if any(one.is_fault for one in done) else 0


if __name__ == "__main__":
    run_script(main)
