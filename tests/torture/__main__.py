"""Torture: many trials of every fault, one table of what was tried and what was lost.

    python -m tests.torture
    python -m tests.torture --only kill --rounds 25 --seed 7

A round is a trial of every kind of kill (parts kill, calls and reuse), a source of a run that
reuses damaged before the plan and one after (reuse), four regions of a checkpoint file and one run
database altered (damage), and 80 mutated files for every reader (fuzz). The database is locked for
ever (locked) once in all. Two hosts of a cluster (hosts) lose their link, or differ in weights or
folders, once in twenty rounds.
Exit status: 0 nothing lost, 1 something was.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
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
    modules = [import_module(f"tests.torture.{name}") for name in _module_names()]
    parts = {
        module.__name__.rpartition(".")[2]: module.trials
        for module in modules
        if hasattr(module, "trials")
    }
    unknown = sorted(set(parsed.only or []) - set(parts))
    if unknown:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(parts)}")
    chosen = [name for name in parts if not parsed.only or name in parsed.only]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        for name in chosen:
            outcomes += parts[name](Path(folder) / name, parsed.rounds, parsed.seed)
    columns = ["tried", "trials", "happened", "lost"]
    print_table(columns, [(one.what, one.trials, one.happened, one.lost) for one in outcomes])
    lost = [one for one in outcomes if one.lost != "nothing"]
    print_line(f"{sum(one.trials for one in outcomes)} trials, {len(lost)} kinds lost something")
    return 1 if lost else 0


def _module_names() -> list[str]:
    folder = str(Path(__file__).parent)
    return [one.name for one in pkgutil.iter_modules([folder]) if one.name != "__main__"]


if __name__ == "__main__":
    sys.exit(main())
