"""Output: results on stdout as tables, lines or JSON; notes on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TextIO

from lib.units import first_within, printable, shortened_to

__all__ = [
    "LiveLines",
    "note",
    "print_fields",
    "print_json",
    "print_line",
    "print_result",
    "print_table",
    "terminal_width",
]

# Where all columns of a table have to be shortened, each keeps so many characters.
_LEAST_WIDTH = 8


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
    """Print a result as JSON on stdout, with null for numbers that are not finite."""
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: object) -> object:
    """Return a value with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    shortened: Mapping[str, int] = {},
) -> None:
    """Print rows under their column names, with numbers aligned right.

    Until the table fits the terminal, the columns of `least_needed` are left out in their order.
    With `shortened`, lines never wrap: its columns give what is missing, down to so many
    characters, and only if that is not enough, all columns do. One of them that stands in
    `least_needed` is shortened at its first turn there, and left out at its second.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if title is not None:
        print(f"\n{title}", file=stream)
    cells = [[_cell(value) for value in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(columns))
    ]
    lines = [list(columns), *cells]
    widths = {i: max(len(line[i]) for line in lines) for i in range(len(columns))}
    room = terminal_width(stream)
    giving = {columns.index(name): least for name, least in shortened.items() if name in columns}
    turns = [columns.index(name) for name in least_needed if name in columns]
    widths = _fitted(_left_in(widths, room, turns, giving), room, giving)
    for line in lines:
        shown = {i: shortened_to(width, line[i]) for i, width in widths.items()}
        padded = (
            cell.rjust(widths[i]) if right[i] else cell.ljust(widths[i])
            for i, cell in shown.items()
        )
        print("  ".join(padded).rstrip()[: room if shortened else None], file=stream)


def _left_in(
    widths: Mapping[int, int], room: int, turns: Sequence[int], giving: Mapping[int, int]
) -> dict[int, int]:
    """Return the widths of the columns that `room` has place for, once those `giving` give."""
    left, least = dict(widths), dict(widths)
    for i in turns:
        if _line_width(least) <= room:
            break
        if least.get(i, 0) > giving.get(i, sys.maxsize):
            least[i] = giving[i]
        else:
            left.pop(i, None)
            least.pop(i, None)
    return left


def _fitted(widths: Mapping[int, int], room: int, giving: Mapping[int, int]) -> dict[int, int]:
    """Return widths so that a line fits `room`: those `giving` give in turn, then all."""
    fitted = dict(widths)
    for i, least in giving.items():
        if i in fitted:
            missing = max(0, _line_width(fitted) - room)
            fitted[i] = max(fitted[i] - missing, min(least, fitted[i]))
    while giving and _line_width(fitted) > room and max(fitted.values()) > _LEAST_WIDTH:
        widest = max(fitted, key=lambda i: fitted[i])
        fitted[widest] -= 1
    return fitted


def _line_width(widths: Mapping[int, int]) -> int:
    return sum(width + 2 for width in widths.values()) - 2


class LiveLines:
    """Lines that replace each other on a terminal; elsewhere they are printed when they change."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, lines: Sequence[Sequence[str]]) -> None:
        """Replace the lines shown before by these; of the forms of each, the first that fits."""
        on_terminal = sys.stdout.isatty()
        # A line longer than the terminal would wrap, and the cursor would move back too little.
        room = terminal_width(sys.stdout) if on_terminal else sys.maxsize
        cut = [first_within(room, [_cell(form) for form in forms])[:room] for forms in lines]
        if cut == self._shown:
            return
        if on_terminal and self._shown:
            print(f"\x1b[{len(self._shown)}F\x1b[J", end="")
        self._shown = cut
        print("\n".join(cut), flush=True)


def terminal_width(stream: TextIO) -> int:
    """Return the columns of a line: of COLUMNS, or the terminal; a file has no limit.

    Some terminals, such as those of containers, report a width of 0: they count as 80 wide.
    """
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    if not stream.isatty():
        return sys.maxsize
    return os.get_terminal_size(stream.fileno()).columns or 80


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))
