"""The house: if this fails, the README's tree lies, or a module reaches where it must not."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
TREE = README.split("## The tree")[1].split("```")[1]
MODULES = re.findall(r"^  (\w+)\.py ", TREE.split("\nlib/")[1].split("\nschema/")[0], re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at the top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("folder", ["scripts", "lib", "schema"])
def test_the_readme_names_every_file_of_a_folder(folder: str) -> None:
    part = TREE.split(f"\n{folder}/")[1]
    part = re.split(r"\n\S", part)[0]
    named = set(re.findall(r"^  (\S+)", part, re.MULTILINE))
    there = {
        path.name
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".sql", ".html") and path.name != "__init__.py"
    }
    assert named == there


def test_modules_import_only_from_those_above_them() -> None:
    for i, module in enumerate(MODULES):
        for name in imports(ROOT / "lib" / f"{module}.py"):
            package, _, rest = name.partition(".")
            assert package not in ("scripts", "tests")
            imported = rest.partition(".")[0]
            if package == "lib" and imported:
                assert imported in MODULES[:i], f"lib/{module}.py imports {name}"


def test_schema_imports_nothing_of_lib() -> None:
    for path in (ROOT / "schema").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "lib"}


def test_nothing_in_lib_prints_or_parses_arguments_but_the_console() -> None:
    for path in (ROOT / "lib").glob("*.py"):
        if path.name == "console.py":
            continue
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in calls, path.name
        used = {name for name in imports(path) if name.startswith("argparse")}
        # Weights pickle an argparse.Namespace: reading and writing them needs the name.
        assert not used or path.name in ("weights.py", "untrained.py", "torch_archive.py"), (
            path.name
        )


def test_every_script_shows_how_to_call_it() -> None:
    for path in (ROOT / "scripts").glob("[!_]*.py"):
        documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python scripts/{path.name}" in documentation
        assert "Exit status" in documentation


def test_every_target_has_a_line_of_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE) == targets


def test_every_test_file_says_what_a_user_would_lose() -> None:
    for path in (ROOT / "tests").glob("test_*.py"):
        documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(documentation) > 40, path.name
