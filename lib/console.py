"""The console: arguments, tables, JSON, progress bars and exit statuses of every script."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lib.errors import LedgerError
from lib.settings import DEFAULT_CONFIG, load_settings
from lib.units import printable

__all__ = [
    "LiveLines",
    "ResidueBar",
    "arguments",
    "database_url",
    "download_bar",
    "guarded",
    "note",
    "overrides",
    "print_fields",
    "print_json",
    "print_line",
    "print_result",
    "print_table",
    "run_script",
    "settings_arguments",
]

# Flag of a script, and the option of config.ini that it overrides.
_FLAGS = {
    "esm_model": "model.esm_model",
    "repr_layers": "model.repr_layers",
    "input": "input.fasta",
    "output": "output.folder",
    "include": "output.include",
    "database": "database.url",
}
_SECONDS_BETWEEN_LINES = 60.0


def arguments(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every script takes: --config, --database and --json."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database", metavar="URL", help="run database: a SQLite path or URL")
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="settings file (default: the project's config.ini)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def settings_arguments(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add the named ones of the flags that override config.ini, and --set."""
    group = parser.add_argument_group("overriding config.ini")
    helps = {
        "esm_model": ("MODEL", "a released name in full, or the path of weights"),
        "input": ("FASTA", "the FASTA file"),
        "output": ("FOLDER", "the folder that gets a folder for every run"),
    }
    for flag, (metavar, explanation) in helps.items():
        if flag in flags:
            option = f"--{flag.replace('_', '-')}"
            group.add_argument(option, metavar=metavar, help=explanation)
    if "include" in flags:
        group.add_argument(
            "--include", nargs="+", metavar="KIND", help="mean, bos, per_tok, contacts"
        )
    if "repr_layers" in flags:
        group.add_argument(
            "--repr-layers",
            nargs="+",
            type=int,
            metavar="LAYER",
            help="layers to keep: 0 the embedding, -1 the last",
        )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.OPTION=VALUE",
        help="any option of config.ini",
    )


def overrides(parsed: argparse.Namespace) -> dict[str, str]:
    """Return what the flags say, as "section.option" to text; a flag outranks --set."""
    said: dict[str, str] = {}
    for setting in getattr(parsed, "set", []):
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise LedgerError(f"--set {setting}: not section.option=value")
        said[key.strip()] = value
    for flag, key in _FLAGS.items():
        value = getattr(parsed, flag, None)
        if value is not None:
            said[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return said


def database_url(parsed: argparse.Namespace) -> str:
    """Return where the run database lies, by --database or --set, else by config.ini."""
    said = {key: value for key, value in overrides(parsed).items() if key == "database.url"}
    return load_settings(parsed.config, said).database.url


def run_script(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a script's main on the command line and exit with its status."""
    sys.exit(guarded(main, None))


def guarded(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run a script's main; what a user can cause ends in one line on stderr and a status."""
    try:
        status = main(argv)
        sys.stdout.flush()
    except LedgerError as error:
        note(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        note("error: SIGINT: interrupted")
        return 130
    except BrokenPipeError:
        # The reader of stdout went away: nothing can be said to it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 4
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        note(f"error: {place}{error.strerror or error}")
        return 4
    except MemoryError:
        note("error: out of memory")
        return 4
    return status


def note(line: str) -> None:
    """Print a line of progress or diagnosis on stderr."""
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
    sys.stdout.flush()  # who reads it may wait for it while the script goes on


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
    """Print rows under their column names, numbers to the right.

    Columns of `least_needed` are left out, in this order, until the table fits the terminal.
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
        kept.remove(columns.index(name))
    for row in [list(columns), *cells]:
        padded = (row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in kept)
        print("  ".join(padded).rstrip(), file=stream)


class LiveLines:
    """Lines that are printed again in their place on a terminal, or, elsewhere, if they change."""

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, lines: Sequence[str]) -> None:
        """Print the lines instead of those shown before."""
        on_terminal = sys.stdout.isatty()
        # A line longer than the terminal would wrap, and the cursor not find its way back.
        cut = [_cell(line)[: _width() if on_terminal else None] for line in lines]
        if cut == self._shown:
            return
        if on_terminal and self._shown:
            print(f"\x1b[{len(self._shown)}F\x1b[J", end="")
        self._shown = cut
        print("\n".join(cut), flush=True)


class ResidueBar:
    """A progress bar in residues: how many of all, rate, time left; one line a minute if no tty."""

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm  # here, as history has no bar and starts in a moment

        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="res",
            unit_scale=True,
            desc="embedding",
            mininterval=0.2 if on_terminal else _SECONDS_BETWEEN_LINES,
            file=sys.stderr,
            ascii=None if on_terminal else True,
        )

    def advance(self, residues: int) -> None:
        """Count residues as done."""
        self._bar.update(residues)

    def __enter__(self) -> ResidueBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that shows bytes received, of all if that is known; the line ends with it."""
    from tqdm import tqdm

    bar = tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr)

    def show(received: int, total: int | None) -> None:
        bar.total = total
        bar.update(received - bar.n)

    with bar:
        yield show


def _width() -> int:
    # As wide as COLUMNS or the terminal says; no limit where nobody looks.
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return sys.maxsize


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))
