"""Output: results on stdout as tables, lines or JSON; notes on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from lib.units import printable

__all__ = [
    "LiveLines",
    "note",
    "print_fields",
    "print_json",
    "print_line",
    "print_result",
    "print_table",
]


def note(line: str) -> None:
    """Print a line of progress or diagnosis on stderr; a bar that is drawn there makes room."""
    tqdm = sys.modules.get("tqdm")  # history starts in a moment, without it
    with nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr):
        print(line, file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """Print a result on stdout."""
    print(line)


def print_result(content: object, lines: Sequence[str], *, as_json: bool) -> None:
    """Print a result on stdout: `content` as JSON for programs, or `lines` for people."""
    if as_json:
        print_json(content)
    else:
        print_line("\n".join(lines))
    sys.stdout.flush()  # a program may wait for the result while the script keeps running


def print_json(content: object) -> None:
    """Print a result as JSON on stdout."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one row as a line per column."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {_cell(value)}".rstrip())


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    title: str | None = None,
    to_stderr: bool = False,
    least_needed: Sequence[str] = (),
) -> None:
    """Print rows under their column names, with numbers aligned right.

    Until the table fits the terminal, the columns of `least_needed` are left out in their order.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if title is not None:
        print(f"\n{title}", file=stream)
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [
        max(len(name), *(len(row[i]) for row in cells)) if cells else len(name)
        for i, name in enumerate(columns)
    ]
    right = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(columns))
    ]
    kept = list(range(len(columns)))
    for name in least_needed:
        if sum(widths[i] + 2 for i in kept) - 2 <= _width():
            break
        if name in columns:
            kept.remove(columns.index(name))
    for row in [list(columns), *cells]:
        padded = (row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in kept)
        print("  ".join(padded).rstrip(), file=stream)


class LiveLines:
    """Lines that replace each other on a terminal; elsewhere they are printed when they change."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, lines: Sequence[str]) -> None:
        """Replace the lines shown before by these."""
        on_terminal = sys.stdout.isatty()
        # A line longer than the terminal would wrap, and the cursor would move back too little.
        cut = [_cell(line)[: _width() if on_terminal else None] for line in lines]
        if cut == self._shown:
            return
        if on_terminal and self._shown:
            print(f"\x1b[{len(self._shown)}F\x1b[J", end="")
        self._shown = cut
        print("\n".join(cut), flush=True)


def _width() -> int:
    # COLUMNS or the terminal sets the width; output to a file has no limit.
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return sys.maxsize


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))
