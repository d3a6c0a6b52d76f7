"""Programs: if these fail, what a user wrote on the command line ends in a traceback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pytest

from lib.console.program import ctrl_c_within, guarded
from tests import processes
from tests.conftest import ROOT, SOME_PROTEINS, Place, Script, handled_by

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
# The tests may run in the background, where SIGINT is ignored.
AS_FROM_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
NOT_UTF8 = os.fsdecode(b"m\xff")
LARGE = "9" * 20
NO_RUN = f"not a whole number from 1 to {(1 << 63) - 1}"
WITH_RUN = [name for name in SCRIPTS if '"--run"' in (ROOT / f"scripts/{name}.py").read_text()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_argument_that_is_not_utf8_is_one_line(name: str) -> None:
    """Before, a script ended in a traceback as soon as it stored or printed the path."""
    answer = processes.run(name, "--config", f"{NOT_UTF8}/config.ini")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == "error: argument 'm\\udcff/config.ini': not UTF-8\n"


def test_a_name_in_an_input_folder_that_is_not_utf8_is_refused_at_once(
    script: Script, place: Place, small_model: Path
) -> None:
    folder = place.folder / "proteins"
    folder.mkdir()
    for name in ("a.fasta", NOT_UTF8 + ".fasta"):
        shutil.copy(SOME_PROTEINS, folder / name)
    answer = script("embed", "--esm-model", small_model, "--input", folder)
    assert (answer.status, answer.error) == (2, f"{folder}: 'm\\udcff.fasta': not UTF-8")
    assert not place.database.exists()


def test_a_current_folder_that_is_not_utf8_is_one_line(place: Place, small_model: Path) -> None:
    folder = place.folder / NOT_UTF8
    folder.mkdir()
    shutil.copy(SOME_PROTEINS, folder / "some.fasta")
    flags = ["--esm-model", small_model, "--config", place.config, "--input", "some.fasta"]
    answer = processes.run("embed", *flags, folder=folder)
    assert answer.status == 2
    assert answer.error == f"'{place.folder}/m\\udcff/some.fasta': not UTF-8"
    assert list(place.output.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("name", "flag", "value", "fact"),
    [
        *((name, "--run", LARGE, NO_RUN) for name in WITH_RUN),
        ("history", "--run", "one", NO_RUN),
        ("history", "--run", "0", NO_RUN),
        ("neighbours", "--query", LARGE, NO_RUN),
        ("make_model", "--seed", LARGE, f"not a whole number from {-(1 << 63)} to {(1 << 64) - 1}"),
        ("history", "--every", "abc", "not from 0.1 to 3600"),
        ("history", "--every", "nan", "not from 0.1 to 3600"),
    ],
)
def test_a_number_out_of_bounds_is_one_line(
    name: str, flag: str, value: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, a large one ended in a traceback: OverflowError."""
    with pytest.raises(SystemExit) as ended:
        import_module(f"scripts.{name}").main([flag, value])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: argument {flag}: {value}: {fact}\n")


def test_a_limit_of_arrow_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_argv: object) -> int:
        raise pa.ArrowInvalid("offset overflow\nwhile concatenating arrays")

    assert guarded(main, []) == 4
    told = "error: ArrowInvalid: offset overflow while concatenating arrays\n"
    assert capsys.readouterr().err == told


def test_a_fault_of_the_program_shows_where_it_is() -> None:
    def main(_argv: object) -> int:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        guarded(main, [])


# ---- Before main begins


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_python_without_the_packages_is_one_line(name: str, tmp_path: Path) -> None:
    bare = [sys.executable, "-S", "-E"]  # the standard library alone
    done = subprocess.run(
        [*bare, ROOT / "scripts" / f"{name}.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (4, "")
    package = {"benchmark": "numpy", "make_model": "torch"}.get(name, "marshmallow")
    assert done.stderr == (
        f"error: {sys.executable}: no package {package} (make setup installs .venv/bin/python)\n"
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_during_the_imports_is_one_line(name: str, tmp_path: Path) -> None:
    for package in ("marshmallow", "torch"):
        (tmp_path / f"{package}.py").write_text(
            "import sys, time\n"
            "print('reached', file=sys.stderr, flush=True)\n"
            "while True:\n    time.sleep(0.01)\n"
        )
    with subprocess.Popen(
        [sys.executable, "-c", AS_FROM_A_TERMINAL, ROOT / "scripts" / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "reached\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: SIGINT: interrupted\n")


def test_a_signal_that_is_to_be_ignored_stays_so(tmp_path: Path) -> None:
    (tmp_path / "marshmallow.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('so far')\n"
    )
    done = subprocess.run(
        ["sh", "-c", f"trap '' INT; exec {sys.executable} {ROOT}/scripts/history.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: {sys.executable}: so far (make setup ")


def test_a_copied_project_runs_its_own_code(tmp_path: Path) -> None:
    """Before, a copy whose .venv was made in the original ran the original's lib."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("raise SystemExit('the code of the copy')\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "history.py"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == "the code of the copy\n"


def test_a_script_runs_as_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.history", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_may_come_at_any_moment_of_waiting_for_it() -> None:
    """Before, one that came while a lock was held waited for that lock for ever."""
    with handled_by(signal.SIGINT, signal.default_int_handler), ctrl_c_within() as stopped_within:
        assert not stopped_within(0)
        try:
            sys.setprofile(lambda *_: signal.raise_signal(signal.SIGINT))
            stopped = stopped_within(60)
        finally:
            sys.setprofile(None)
        assert stopped
        assert stopped_within(60)


def test_ctrl_c_that_is_to_be_ignored_ends_no_waiting_for_it() -> None:
    with handled_by(signal.SIGINT, signal.SIG_IGN), ctrl_c_within() as stopped_within:
        signal.raise_signal(signal.SIGINT)
        assert not stopped_within(0)
