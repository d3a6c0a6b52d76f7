"""Fixtures: small untrained models, real proteins, a fresh workplace, and the scripts called."""

from __future__ import annotations

import configparser
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType

import hypothesis
import pytest

from lib.console.program import guarded
from lib.ledger.sqlite_file import connect_read_only
from lib.settings import DEFAULT_CONFIG
from tests import processes
from tests.interpreter import interpreter
from tests.processes import ROOT as ROOT
from tests.processes import Answer as Answer

# The same examples every time, so that a change fails for what it changed. New ones are tried with
# `make test ARGS=--hypothesis-profile=default`.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

DATA = Path(__file__).parent / "data"
# UniRef50 representatives of 71 to 935 residues; and the same with the six longest cut, for the
# many tests that need any run of real proteins.
WHOLE_PROTEINS = DATA / "some_proteins.fasta"
SOME_PROTEINS = DATA / "short_proteins.fasta"
# Of UniProt, with full headers; what has over 230 residues is cut to a quarter, but for one.
UNIPROT_PART = DATA / "uniprot_part.fasta"
# What make hands down, and the Makefile's variables: `make test ARGS=...` exports them.
_OF_MAKE = re.compile(
    r"MAKE\w*|MFLAGS|MODEL|INPUT|OUTPUT|RUN|LABEL|RAY|FORMAT|TO|QUERY|CONFIG|ARGS|esm_\w+|COLUMNS"
)


def users_environment() -> dict[str, str]:
    """Return the environment of a user's shell, whatever started the tests."""
    return {name: value for name, value in os.environ.items() if not _OF_MAKE.fullmatch(name)}


Script = Callable[..., Answer]
Once = Callable[[Callable[[], object]], None]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one more than the logical cores, as each now and then waits for other processes."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or cores + 1)


def pytest_configure() -> None:
    """Collect no garbage while tests are imported: there is none."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the groups, which one process does whole: the others end meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish() -> None:
    """Let garbage collections leave alone what was imported: some 300,000 objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_power_cuts() -> Iterator[None]:
    """Let SQLite not wait for the disk in this process: only a power cut would tell.

    Processes that tests start wait for it, and tests/ledger/test_checkpoints.py sees that.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.ledger.database._SYNCHRONOUS", "OFF")
        yield


@pytest.fixture(autouse=True, scope="module")
def collections_of_garbage() -> Iterator[None]:
    """Collect a module's garbage at its end, so that what it left open is its failure.

    What is left is imported, or kept for the session: no later collection looks at it again.
    """
    yield
    gc.collect()
    gc.freeze()


@contextmanager
def handled_by(
    number: signal.Signals, handler: Callable[[int, FrameType | None], object] | signal.Handlers
) -> Iterator[None]:
    """Let a signal have this handler until the end of the block."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class _SeenFile:
    """A file that tells from which threads it is called."""

    def __init__(self, file: object, threads: set[int]) -> None:
        self._file, self._threads = file, threads

    def __getattr__(self, name: str) -> object:
        self._threads.add(threading.get_native_id())
        return getattr(self._file, name)


@pytest.fixture
def reading_threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Collect the threads from which Arrow calls the open files that it reads.

    One that still does so when the process ends aborts it: no thread but the main one may.
    """
    import pyarrow.parquet as pq

    seen: set[int] = set()
    opened = pq.ParquetFile

    def seen_file(source: object, **options: object) -> object:
        return opened(_SeenFile(source, seen), **options)

    monkeypatch.setattr(pq, "ParquetFile", seen_file)
    return seen


def run_program(folder: Path, program: str, *, afresh: bool = False) -> str:
    """Run a program as a page prints it, in a folder; return what it prints.

    afresh: by a Python of its own, which has to import everything and to come to its end.
    """
    environment = {
        **os.environ,
        # DuckDB's extensions and the cache of datasets: nothing outside the folder.
        "HOME": str(folder),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
    }
    if not afresh:
        answer = processes.run_program(program, folder=folder, environment=environment)
        assert answer.status == 0, answer.err
        return answer.out
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Undo `compute.threads` of scripts that ran in this process: more threads wait for others."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stand-in for the Python of a copied project; see tests/interpreter.py."""
    with interpreter(tmp_path_factory.mktemp("python")) as path:
        yield path


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], place: Place) -> Script:
    """Call a script's main in this process: script("embed", "--input", path)."""

    def call(name: str, *argv: str | Path) -> Answer:
        main = import_module(f"scripts.{name}").main
        capsys.readouterr()
        status = guarded(main, [*map(str, argv), *place.flags(name, argv)])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return call


@dataclass
class Place:
    """A folder with a config.ini of its own, so that no test touches the project's."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.ini"

    @property
    def database(self) -> Path:
        return self.folder / "runs.sqlite"

    @property
    def output(self) -> Path:
        return self.folder / "embeddings"

    def files(self) -> set[Path]:
        """Return what lies in the folder, but for what SQLite keeps beside a database."""
        return {path for path in self.folder.iterdir() if ".sqlite-" not in path.name}

    @contextmanager
    def read_by_another(self) -> Iterator[None]:
        """Keep the database open, so that SQLite's file of shared memory has its size."""
        with closing(connect_read_only(self.database)) as connection:
            connection.execute("SELECT count(*) FROM runs").fetchone()
            yield

    def flags(self, _name: str, argv: Sequence[str | Path]) -> list[str]:
        """Return --config, unless the arguments say one."""
        return [] if "--config" in argv else ["--config", str(self.config)]

    def set(self, section: str, option: str, value: object) -> None:
        """Change an option of config.ini."""
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
        parser.read(self.config)
        if not parser.has_section(section):
            parser.add_section(section)
        parser.set(section, option, str(value))
        with self.config.open("w") as file:
            parser.write(file)

    def run(self, name: str, *argv: str | Path, **environment: str) -> Answer:
        """Run a script as a process of its own."""
        flags = [*argv, *self.flags(name, argv)]
        environment = {**os.environ, **environment}
        return processes.run(name, *flags, folder=self.folder, environment=environment)

    def run_afresh(self, name: str, *argv: str | Path) -> Answer:
        """Run a script with a Python of its own, as a shell does."""
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / f"{name}.py", *argv, *self.flags(name, argv)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=300,
        )
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A fresh folder with a copy of config.ini; torch hub's cache is an empty folder of it.

    Every run computes, as most tests want it, unless a test sets `[output] reuse`. It computes on
    the CPU, where torch's forks can, unless a test sets `[compute] device`.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    # Tables are as wide as they need to be, whatever the tests are run from.
    monkeypatch.delenv("COLUMNS", raising=False)
    fresh = Place(tmp_path)
    text = DEFAULT_CONFIG.read_text()
    for option, own in [("reuse = yes", "reuse = no"), ("device = auto", "device = cpu")]:
        text = text.replace(f"\n{option}\n", f"\n{own}\n")
    fresh.config.write_text(text)
    return fresh


@pytest.fixture(scope="session")
def _templates() -> dict[str, Path]:
    return {}


@pytest.fixture
def once(
    place: Place, tmp_path_factory: pytest.TempPathFactory, _templates: dict[str, Path]
) -> Once:
    """Fill the place by calling a function, or with a copy of what its first call left there.

    Paths of the place are stored as relative ones, so that a copied place works as the first did.
    """

    def fill(make: Callable[[], object]) -> None:
        name = f"{make.__module__}.{make.__qualname__}"
        if name in _templates:
            shutil.copytree(_templates[name], place.folder, dirs_exist_ok=True)
            return
        make()
        folder = tmp_path_factory.mktemp("template")
        _templates[name] = shutil.copytree(place.folder, folder, dirs_exist_ok=True)

    return fill


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 64 wide, 4 heads; untrained."""
    return _made(tmp_path_factory.mktemp("models") / "esm2_small.pt", 2, 64, 4)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of small_model, other weights: as a fine-tune would be."""
    return _made(tmp_path_factory.mktemp("other") / "esm2_small.pt", 2, 64, 4, seed=1)


@pytest.fixture(scope="session")
def tall_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, 96 wide: another shape."""
    return _made(tmp_path_factory.mktemp("tall") / "esm2_tall.pt", 3, 96, 6)


def _made(path: Path, *shape: int, seed: int = 0) -> Path:
    # Imported here, as the process that hands the tests out needs no torch.
    from lib.models.untrained import make_model

    make_model(path, *shape, seed=seed)
    return path
