"""make: if this fails, a path with a blank in it, or a second `make setup`, costs an hour."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SOME_PROTEINS, Place, Script, users_environment
from tests.reference import read_run


def make(
    *words: str, folder: Path = ROOT, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=folder,
        env={**users_environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_setup_is_not_run_again() -> None:
    done = make("setup")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_setup_refuses_a_python_that_is_too_old_in_one_line(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text(
        "#!/bin/sh\nshift\n"
        f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 1); $1"\n'
    )
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        "Python 3.10: 3.11 to 3.13 is needed (make PYTHON=python3.12)"
    )
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("odd", ["it's 50%s", 'say "ünï" $HOME$$b;#'])
def test_values_reach_the_scripts_as_they_are(
    place: Place, small_model: Path, quick_python: Path, odd: str
) -> None:
    folder = place.folder / odd
    folder.mkdir()
    model = shutil.copy(small_model, folder / "esm2 model.pt")
    source = shutil.copy(SOME_PROTEINS, folder / "some proteins.fasta")
    config = shutil.copy(place.config, folder / "config.ini")
    # Through the environment: on make's own command line `$` is make's, as everywhere in make.
    variables = {
        "MODEL": str(model),
        "INPUT": str(source),
        "OUTPUT": str(folder / "out"),
        "CONFIG": str(config),
        "LABEL": odd,
    }
    quick = f"python={quick_python}"
    done = make("embed", "ARGS=--json", quick, variables=variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] == odd
    assert len(read_run(folder / "out" / "run-000001")) == 15
    for target in ("resume", "validate", "history"):
        again = make(target, quick, variables={"RUN": "1", "CONFIG": str(config)})
        assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("embed", ["config", "esm-model", "output", "label", "ray"]),
        ("export", ["run", "format", "to"]),
        ("neighbours", ["query"]),
    ],
)
def test_a_value_may_begin_with_a_dash(target: str, options: list[str]) -> None:
    """Before, it was taken for an option: `argument --label: expected one argument`."""
    names = ["CONFIG", "MODEL", "OUTPUT", "LABEL", "RAY", "RUN", "FORMAT", "TO", "QUERY"]
    variables = {name: f"-{name.lower()} x" for name in names}
    shown = make(target, "python=echo", variables=variables).stdout
    for option in options:
        assert f"--{option}=-{option.removeprefix('esm-')} x" in shown


def test_variables_on_the_command_line(place: Place, small_model: Path) -> None:
    """With the Python of `make setup`: the other tests use a stand-in that starts fast."""
    done = make(
        "embed", f"MODEL={small_model}", f"INPUT={SOME_PROTEINS}", f"CONFIG={place.config}",
        f"OUTPUT={place.folder / 'my out'}", "ARGS=--include bos mean --repr-layers 0 -1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"model {small_model.stem}: ")  # nothing was said by an import
    row = read_run(place.folder / "my out" / "run-000001")[0]
    assert {"bos_0", "bos_2", "mean_0", "mean_2"} < row.keys()


def test_a_refusal_comes_through_make_with_its_line(place: Place, quick_python: Path) -> None:
    done = make("validate", "MODEL=650M", f"CONFIG={place.config}", f"python={quick_python}")
    assert done.returncode != 0
    assert done.stderr.startswith("error: esm_model ")
    assert "Error 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_demo_model_that_another_make_has_made_meanwhile_is_kept(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nmkdir -p models && echo whole > $5 && exit 2\n")
    python.chmod(0o755)
    model = tmp_path / "models" / "esm2_untrained_t6_8M.pt"
    done = make(str(model.relative_to(tmp_path)), f"python={python}", folder=tmp_path)
    assert done.returncode != 0
    assert model.read_text() == "whole\n"


@pytest.mark.parametrize("name", ["model", "input", "run", "label", "args"])
def test_a_variable_in_small_letters_is_refused_in_one_line(name: str) -> None:
    """Before, make went on without a word, with the model of config.ini."""
    done = make("history", f"{name}=a b", variables={"config": "of the shell"})
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith(f" *** {name}= is not a variable, {name.upper()}= is.  Stop.")


def test_a_variable_of_the_shell_is_nobodys_business(place: Place) -> None:
    quick = "python=true"
    variables = {"model": "a", "run": "b", "MODEL": "c"}
    assert make("history", quick, variables=variables).returncode == 0


@pytest.mark.parametrize(
    ("words", "name", "targets"),
    [
        ("embed RUN=1", "RUN", "embed (MODEL INPUT OUTPUT LABEL RAY CONFIG ARGS)"),
        ("backup OUTPUT=x TO=y", "OUTPUT", "backup (TO CONFIG ARGS)"),
        ("setup history RUN=1 MODEL=x", "MODEL", "setup history (RAY RUN CONFIG ARGS)"),
        ("RUN=1", "RUN", "help (it has none)"),
    ],
)
def test_a_variable_that_a_target_does_not_take_is_refused_in_one_line(
    words: str, name: str, targets: str
) -> None:
    """Before, `make embed RUN=1` began a new run."""
    done = make(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith(f" *** {name}= is not a variable of {targets}.  Stop.")


def test_of_several_targets_each_may_have_variables_of_its_own() -> None:
    done = make("--jobs=2", "setup", "history", "prune", "RAY=", "RUN=1", "python=true")
    assert done.returncode == 0, done.stderr
    assert "RUN" not in make("no-such-target", "RUN=1").stderr


def test_a_target_takes_the_variables_that_its_recipe_uses() -> None:
    text = (ROOT / "Makefile").read_text()
    table = dict(re.findall(r"^takes\.([a-z-]+) *:= *(.*)$", text, re.MULTILINE))
    rules = dict(re.findall(r"^([a-z-]+):([^=].*\n(?:\t.*\n)*)", text, re.MULTILINE))
    (variables,) = re.findall(r"^variables := (.*)$", text, re.MULTILINE)
    assert table.keys() == {*re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE)}
    for target, taken in table.items():
        used = {name.upper() for name in re.findall(r"\$\((\w+)\)", rules[target])}
        used |= {"RAY"} if "CLUSTER" in used else set()
        assert {*taken.split()} == used & {*variables.split()}, target


def test_embed_says_first_that_the_input_is_missing(script: Script) -> None:
    for nothing in ([], ["--input", "missing.fasta"]):
        answer = script("embed", *nothing)
        assert (answer.status, answer.err.count("\n")) == (2, 1)
        assert "missing.fasta: no such file" in answer.error or "no input: " in answer.error


def test_setup_says_what_it_installs_and_lets_pip_show_how_far_it_is(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$*"\n'
        'if [ "$2" = venv ]; then mkdir -p $3/bin && cp $0 $3/bin/python; fi\n'
        '[ "$1" != scripts/kernel.py ]\n'  # no C++ compiler
    )
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "packages of pyproject.toml at the versions of constraints.txt" in done.stdout
    assert "1.2 GB on disk" in done.stdout
    (pip,) = re.findall(r"^-m pip install (.*)$", done.stdout, re.MULTILINE)
    assert "quiet" not in pip
    assert "scripts/kernel.py\nattention is computed by torch's operations instead." in done.stdout
    assert done.stdout.splitlines()[-1].endswith("\t.venv")


def test_clean_removes_caches_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = ["benchmarks", "docs", "lib/models", "schema", "scripts", "tests"]
    caches = [".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "esm_ledger.egg-info"]
    caches += [f"{folder}/__pycache__" for folder in program]
    users = ["embeddings/run-000001", ".venv/lib/__pycache__", "models", "reports", "build"]
    for folder in (*caches, *users):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    (tmp_path / "runs.sqlite").touch()
    done = make("clean", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(f"removed {name}" for name in caches[:5]),
        "removed __pycache__ of the program's folders",
    ]
    assert not any((tmp_path / folder).exists() for folder in caches)
    assert all((tmp_path / folder / "file").exists() for folder in users)
    assert (tmp_path / "runs.sqlite").exists()


def test_no_value_is_run(tmp_path: Path, quick_python: Path) -> None:
    """A name of a file is nobody's program, as in `for f in *; do make embed INPUT="$f"; done`."""
    made = tmp_path / "made"
    for odd in (f"$(shell touch {made})", "we$(ird"):
        done = make("detect", f"MODEL={tmp_path}/{odd}.pt", f"python={quick_python}")
        assert f"esm_model {tmp_path}/{odd}.pt: no such file" in done.stderr
    assert not made.exists()
