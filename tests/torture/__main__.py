"""Torture: many trials of every fault, one table of what was tried and what was lost.

    python -m tests.torture
    python -m tests.torture --only kill --rounds 25 --seed 7

A round is a trial of every kind of kill (parts kill, calls and reuse), a source of a run that
reuses damaged before the plan and one after (reuse), four regions of a checkpoint file and one run
database altered (damage), 80 mutated files for every reader (fuzz), and a database put back, two
processes on one run and weights swapped (owners). The database is locked for ever (locked) once in
all. Two hosts of a cluster (hosts) lose their link, or differ in weights or folders, once in twenty
rounds.
Exit status: 0 nothing lost, 1 something was.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

# Before torch and numpy are imported: a process with threads cannot be forked safely.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

from lib.console.output import print_line, print_table  # noqa: E402 (not before the lines above)


def main() -> int:
    """Run every part, a module of this package with `trials(folder, rounds, seed)`; print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of every random choice")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run")
    parsed = parser.parse_args()
    parts = _part_names()
    unknown = sorted(set(parsed.only or []) - set(parts))
    if unknown:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(parts)}")
    # What is not asked for is not imported, as that takes half a second.
    chosen = {
        name: import_module(f"tests.torture.{name}").trials
        for name in parts
        if not parsed.only or name in parsed.only
    }
    # Each of the many forks would import again what Arrow reads a folder with, and go through all
    # that is imported.
    for name in ("pandas", "pyarrow.dataset"):
        import_module(name)
    gc.freeze()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for name, trials in chosen.items():
            outcomes += trials(Path(folder) / name, parsed.rounds, parsed.seed)
    columns = ["tried", "trials", "happened", "lost"]
    print_table(columns, [(one.what, one.trials, one.happened, one.lost) for one in outcomes])
    lost = [one for one in outcomes if one.lost != "nothing"]
    print_line(f"{sum(one.trials for one in outcomes)} trials, {len(lost)} kinds lost something")
    return 1 if lost else 0


def _part_names() -> list[str]:
    modules = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [one.stem for one in modules if "\ndef trials(" in one.read_text()]


if __name__ == "__main__":
    sys.exit(main())
