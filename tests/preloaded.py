"""What processes of tests/processes.py find imported and done: a fork begins after a first run.

A program does much only once: SQLAlchemy looks at the tables, torch makes its kernels, modules are
imported late. All of that would be done again in each fork.
"""

from __future__ import annotations

import gc
import io
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock

from tqdm import tqdm

from lib.models.untrained import make_model
from lib.settings import DEFAULT_CONFIG
from tests.conftest import ROOT, SOME_PROTEINS

__all__: list[str] = []


def _run_once() -> None:
    """Embed and read the history: with one thread, since a fork must find none to wait for."""
    with (
        TemporaryDirectory() as name,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        folder = Path(name)
        model, config = folder / "esm2_small.pt", folder / "config.ini"
        make_model(model, 2, 64, 4)
        config.write_text(DEFAULT_CONFIG.read_text())
        flags = ["--input", str(SOME_PROTEINS), "--esm-model", str(model)]
        # A fork cannot use a GPU that the process before it has used.
        flags += ["--set", "compute.threads=1", "--set", "compute.device=cpu"]
        for script, argv in [("embed", flags), ("validate", ["--run", "1"]), ("history", [])]:
            main = import_module(f"scripts.{script}").main
            assert main([*argv, "--config", str(config)]) == 0


for _late in ("datasette.app", "uvicorn"):
    with suppress(ImportError):  # only the extra `browse` has them
        import_module(_late)
for _path in sorted((ROOT / "scripts").glob("[!_]*.py")):
    import_module(f"scripts.{_path.stem}")
# tqdm's own lock is one for all forks: one that is killed while it prints would never give it back.
tqdm.set_lock(RLock())
# tqdm's thread watches all bars now and then, and a fork may find its lock held.
interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
_run_once()
tqdm.monitor_interval = interval
# A fork's garbage collection would touch, and so copy, all that is there.
gc.collect()
gc.freeze()
