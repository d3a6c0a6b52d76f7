"""The house: if this fails, a module reaches where it must not, or a test stands where none looks.

Imports are read, not run. Which room may import which stands in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT, users_environment

README = (ROOT / "README.md").read_text()
TREE = README.split("## The tree")[1].split("```")[1]
RULES = (ROOT / "docs" / "architecture.md").read_text().split("## The rooms")[1].split("\n## ")[0]
GROUND = "the ground"
# Rooms that each may import, beside the ground and schema.
ALLOWED = {
    room: set(re.findall(r"`(\w+)`", others))
    for room, others in re.findall(r"^\| `(\w+)` \| (.*)\|$", RULES, re.MULTILINE)
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("lib", "schema", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
}
LIB = [name for name in MODULES if name.split(".")[0] == "lib"]
ROOMS = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
TEST_FILES = sorted(
    path for path in (ROOT / "tests").rglob("*.py") if "torture" not in path.parts
)  # tests/torture is a program of its own


def statements(tree: ast.AST, *, at_start: bool) -> Iterator[ast.AST]:
    """Yield the nodes of a module, or only those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node, at_start=at_start)


@cache
def imports(path: Path, *, at_start: bool = False) -> frozenset[str]:
    """Return the dotted names that a file imports, everywhere or when it is imported itself."""
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text()), at_start=at_start):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return frozenset(found)


def module_of(name: str) -> str | None:
    """Return the module of this project that an imported name is, or is from."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in MODULES:
            return ".".join(parts[:end])
    return None


def imported_modules(module: str) -> set[str]:
    """Return the modules of this project that a module imports, at the top or in functions."""
    found = {module_of(name) for name in imports(MODULES[module])}
    return {name for name in found if name is not None} - {module}


def room(module: str) -> str:
    """Return the room that a module of lib stands in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else GROUND


def started(module: str) -> set[str]:
    """Return everything that an import of a module imports, ours and others', by first names."""
    seen: set[str] = set()
    others: set[str] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        # The packages that a module is in are imported before it.
        parts = one.split(".")
        waiting += [".".join(parts[:end]) for end in range(1, len(parts))]
        for name in imports(MODULES[one], at_start=True):
            ours = module_of(name)
            if ours is None:
                others.add(name.split(".")[0])
            else:
                waiting.append(ours)
    return others


def test_the_rules_name_every_room() -> None:
    assert set(ALLOWED) == ROOMS
    assert all(others <= ROOMS for others in ALLOWED.values())


def test_the_rules_go_one_way() -> None:
    assert list(TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("name", LIB)
def test_a_module_imports_only_what_its_room_may(name: str) -> None:
    own = room(name)
    allowed = {own, GROUND, *ALLOWED.get(own, ())}
    for imported in imported_modules(name):
        folder = imported.split(".")[0]
        assert folder in ("lib", "schema"), f"{name} imports {imported}"
        if folder == "lib" and imported != "lib":
            assert room(imported) in allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("own", sorted([*ROOMS, GROUND]))
def test_imports_within_a_room_form_no_circle(own: str) -> None:
    members = {name for name in LIB if room(name) == own}
    try:
        order = TopologicalSorter({name: imported_modules(name) & members for name in members})
        assert set(order.static_order()) == members
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1][::-1]))


def test_schema_imports_nothing_of_lib() -> None:
    for path in (ROOT / "schema").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "lib"}


def test_sequences_ledger_and_embeddings_start_without_torch() -> None:
    for name in LIB:
        # torch_files writes torch's own format: embeddings/export.py imports it only for that.
        if room(name) in ("sequences", "ledger", "embeddings") and "torch_files" not in name:
            assert "torch" not in started(name), name


def test_a_worker_knows_no_database() -> None:
    known = started("lib.jobs.worker")
    assert "torch" in known
    assert not known & {"sqlalchemy", "sqlite3"}


@pytest.mark.parametrize("script", ["history", "query"])
def test_what_only_reads_history_starts_without_torch_and_sqlalchemy(script: str) -> None:
    assert not started(f"scripts.{script}") & {"torch", "sqlalchemy", "pyarrow", "numpy"}


@pytest.mark.parametrize("name", [name for name in LIB if room(name) != "console"])
def test_nothing_in_lib_prints_or_parses_arguments_but_the_console(name: str) -> None:
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
    calls = {
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls
    used = {imported for imported in imports(MODULES[name]) if imported.startswith("argparse")}
    # Weights pickle an argparse.Namespace: reading and writing them needs the name.
    assert not used or room(name) == "models"
    parts = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "argparse"
    }
    assert used <= {"argparse", "argparse.Namespace"}
    assert parts <= {"Namespace"}


@pytest.mark.parametrize("folder", ["scripts", "lib", "schema"])
def test_the_readme_names_every_file_of_a_folder(folder: str) -> None:
    _, *part = re.split(r"\n(?=\S)", TREE.split(f"\n{folder}/")[1])[0].splitlines()
    # A file with its line, or a line of nothing but names; `.py` goes without saying there.
    named = {line.split()[0].removesuffix(".py") for line in part if re.match(r" +\S+\.\w+ ", line)}
    named |= {
        name for line in part if re.fullmatch(r" +[\w.]+( [\w.]+)*", line) for name in line.split()
    }
    there = {
        path.name.removesuffix(".py")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".sql", ".html", ".cpp")
        and path.name != "__init__.py"
        and "migrations" not in path.parts  # one file per schema version
    }
    assert named == there


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 250


def test_every_script_shows_how_to_call_it() -> None:
    for path in (ROOT / "scripts").glob("[!_]*.py"):
        documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python scripts/{path.name}" in documentation
        assert "Exit status" in documentation
        if "Interruption" in path.read_text():
            assert re.search(r"130,\s143\sor\s129\sinterrupted", documentation), path.name


def test_every_target_has_a_line_of_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory"],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE) == targets


# What tests share; the last makes the folders of data that it stands beside.
SHARED = {
    "adapters.py",
    "catalogs.py",
    "in_process_ray.py",
    "interpreter.py",
    "preloaded.py",
    "processes.py",
    "ray_nodes.py",
    "reference.py",
    "make.py",
}


def test_tests_stand_in_the_folder_of_their_room() -> None:
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in TEST_FILES}
    folders = {name for name in folders if not name.endswith(".py")} - {"data"}
    assert folders == ROOMS


@pytest.mark.parametrize(
    "path", TEST_FILES, ids=[str(path.relative_to(ROOT / "tests")) for path in TEST_FILES]
)
def test_a_test_file_is_named_after_its_feature(path: Path) -> None:
    shared = {"__init__.py", "conftest.py", *SHARED}
    has_tests = "\ndef test_" in path.read_text()
    assert has_tests == (re.fullmatch(r"test_[a-z0-9_]+\.py", path.name) is not None)
    assert has_tests or path.name in shared
    page = re.fullmatch(r"test_docs_(\w+)\.py", path.name)
    if page is not None:
        assert (ROOT / "docs" / f"{page[1].replace('_', '-')}.md").is_file()


@pytest.mark.parametrize("path", [path for path in TEST_FILES if path.name.startswith("test_")])
def test_every_test_file_says_what_a_user_would_lose(path: Path) -> None:
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(documentation) > 40, path.name
