"""Generate: the parts of README and docs that come from the code, for cog to write there.

    .venv/bin/cog -I . -r README.md docs/*.md        # write it into the pages
    .venv/bin/cog -I . --check README.md docs/*.md   # fail if a page is not current

A page asks for a part in a comment that cog reads: `[[[cog from docs import generate; ... ]]]`.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from lib.catalog import RELEASED
from lib.ledger.comments import view_comments
from lib.ledger.questions import questions
from lib.settings import DEFAULT_CONFIG
from lib.units import size

__all__ = ["modules", "queries", "question_list", "settings", "sizes", "speeds", "tree", "views"]

ROOT = Path(__file__).resolve().parent.parent
# The places of the tree: those with `*` show every file with its line, `+` folders and names.
_PLACES = [
    "Makefile", "config.ini", "constraints.txt", "scripts/*", "lib/+", "schema/*", "tests/",
    "docs/", "examples/", "benchmarks/",
]  # fmt: skip
_MEASURED = "2026-11-23-amd-epyc-2-cores.json"
_COLUMN = 20
_WIDTH = 100


def tree() -> str:
    """Return the project's files and folders as a text block, with a line about each."""
    lines = []
    for place in _PLACES:
        path = ROOT / place.rstrip("*+/")
        lines.append(_entry(f"{path.name}/" if path.is_dir() else path.name, path, ""))
        if place.endswith("*"):
            lines += [_entry(file.name, file, "  ") for file in _files(path)]
        elif place.endswith("+"):
            lines += _names(path, "  ")
            for room in _rooms(path):
                lines.append(_entry(f"{room.name}/", room, "  "))
                lines += _names(room, "    ")
    return _fenced("\n".join(lines), "")


def modules() -> str:
    """Return every module of lib in a table for each room, with the first line of its docstring."""
    lib = ROOT / "lib"
    parts = []
    for room in (lib, *_rooms(lib)):
        title = "The ground" if room == lib else f"`lib/{room.name}`"
        about = "what stands on nothing else of lib" if room == lib else _about(room)
        rows = [[f"`{file.name}`", _about(file)] for file in _files(room)]
        parts.append(f"{title}: {about}\n\n{_table(['module', 'what'], rows)}")
    return "\n\n".join(parts)


def views() -> str:
    """Return what the views of the run database hold: a table of columns for each."""
    parts = []
    for name, comment in view_comments().items():
        rows = [[f"`{column}`", text] for column, text in comment.columns.items()]
        parts.append(f"`{name}`: {comment.rows}\n\n{_table(['column', 'what'], rows)}")
    return "\n\n".join(parts)


def settings() -> str:
    """Return the options of config.ini: a table of option, default and explanation by section."""
    tables: dict[str, list[list[str]]] = {}
    about: list[str] = []
    rows: list[list[str]] = []
    for line in DEFAULT_CONFIG.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            about.append(line.removeprefix("# "))
            continue
        if line.startswith("["):
            rows = tables.setdefault(line, [])
        elif "=" in line:
            option, default = (part.strip() for part in line.split("=", 1))
            # An option without a comment of its own shares that of the option before it.
            what = " ".join(about) or rows[-1][2]
            rows.append([f"`{option}`", f"`{default}`" if default else "", what])
        about = []
    columns = ["option", "default", "what"]
    return "\n\n".join(f"`{name}`\n\n{_table(columns, rows)}" for name, rows in tables.items())


def speeds() -> str:
    """Return residues per second of this program by model, as benchmarks/ has them measured."""
    found = json.loads((ROOT / "benchmarks" / _MEASURED).read_text(encoding="utf-8"))
    rows = []
    for case in found["cases"]:
        name, mix, sequences = case["case"].split(":")
        share = 1 - 2 * int(sequences) / case["tokens"]  # <cls> and <eos> are tokens, not residues
        rates = {
            one["contender"]: f"{share * one['tokens_per_second']:,.0f}"
            for one in case["contenders"]
        }
        residues = f"{share * case['tokens']:,.0f}"
        rows.append(
            [name, f"{mix}: {sequences} sequences, {residues} residues"]
            + [rates[f"esm-ledger {precision}"] for precision in ("float32", "bfloat16")]
        )
    columns = ["model", "input", "residues/s, float32", "residues/s, bfloat16"]
    about = f"{found['machine']}, torch {found['versions']['torch']}, {found['date']}, "
    about += f"{found['weights']} weights:"
    return f"{about}\n\n{_table(columns, rows)}"


def sizes() -> str:
    """Return what each released model takes on disk, in memory, by record and by residue."""
    rows = []
    for name, model in RELEASED.items():
        file, width = model.file.bytes, model.shape.hidden_dim
        rows.append(
            [
                f"`{name}`",
                "unknown" if file is None else size(file),
                size(4 * model.shape.parameters),
                size(2 * model.shape.parameters),
                f"{4 * width:,}",
                f"{4 * width:,} or {2 * width:,}",
            ]
        )
    columns = ["model", "`.pt` on disk", "in memory, float32", "in memory, half precision"]
    columns += ["bytes of a `mean`, per record", "of `per_tok`, per residue"]
    return _table(columns, rows)


def queries() -> str:
    """Return the questions of schema/questions.sql, each with its query."""
    return "\n\n".join(f"{one.text}\n\n{_fenced(one.sql, 'sql')}" for one in questions())


def question_list() -> str:
    """Return the questions of schema/questions.sql as a list."""
    return "\n".join(f"- {one.text}" for one in questions())


def _about(path: Path) -> str:
    """Return the line about a file or folder: the first of its docstring, comment or README."""
    if path.is_dir():
        first = path / "__init__.py"
        path = first if first.is_file() else path / "README.md"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    heading = path.suffix == ".md" and text.startswith("# ")
    paragraph = text.split("\n\n")[1 if heading else 0]
    words = " ".join(line.strip("{#-/} ") for line in paragraph.splitlines())
    # The first sentence; "Su et al. 2021" goes on.
    return re.split(r"(?<! al)\. ", words.removeprefix("esm-ledger: "))[0].rstrip(".")


def _entry(name: str, path: Path, indent: str) -> str:
    about = _about(path)
    if len(about) > _WIDTH - _COLUMN:
        about = re.split("[:;] ", about)[0]
    return f"{indent}{name.ljust(_COLUMN - len(indent))}{about}"


def _files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix in (".py", ".sql", ".html", ".cpp"))
    return sorted(file for file in files if file.name != "__init__.py")


def _rooms(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("*/__init__.py"))


def _names(folder: Path, indent: str) -> list[str]:
    names = " ".join(file.name.removesuffix(".py") for file in _files(folder))
    return textwrap.wrap(names, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
