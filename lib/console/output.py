"""The console: arguments, tables, JSON, progress bars and exit statuses of every script."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lib.errors import LedgerError
from lib.settings import DEFAULT_CONFIG, load_settings
from lib.units import count, duration, printable, size

if TYPE_CHECKING:
    from lib.jobs.progress import Progress  # it needs numpy, which history can do without

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
    """Shows the progress of a run: as a bar on a terminal, elsewhere as a line a minute and one
    at the end.
    """

    def __init__(self, progress: Progress) -> None:
        from tqdm import tqdm  # here, as history has no bar and starts in a moment

        self._on_terminal = sys.stderr.isatty()
        # Some terminals, as those of containers, do not know how wide they are.
        sized = self._on_terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._progress = progress
        self._line_is_due = progress.seconds + _SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            total=progress.residues_total,
            initial=progress.residues_before,
            bar_format="embedding {percentage:3.0f}%|{bar}| {desc}",
            desc=_describe_progress(progress),
            miniters=0,
            mininterval=0.2,
            ncols=None if sized else 80,
            dynamic_ncols=sized,
            disable=not self._on_terminal,
            file=sys.stderr,
        )

    def advance(self, lengths: Sequence[int]) -> None:
        """Count a pack as done; lengths: (N,) residues of its sequences."""
        self._progress.advance(lengths)
        self._bar.set_description_str(_describe_progress(self._progress), refresh=False)
        self._bar.update(sum(lengths))
        if not self._on_terminal and self._progress.seconds >= self._line_is_due:
            self._say()

    def __enter__(self) -> ResidueBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if not self._on_terminal:
            self._say()

    def _say(self) -> None:
        note(f"embedding: {_describe_progress(self._progress)}")
        self._line_is_due = self._progress.seconds + _SECONDS_BETWEEN_LINES


def _describe_progress(progress: Progress) -> str:
    """Return `3,100 of 5,000 residues (2,000 before), 12 res/s, 2 min 38 s left`."""
    text = f"{count(progress.residues_done)} of {count(progress.residues_total)} residues"
    if progress.residues_before:
        text += f" ({count(progress.residues_before)} before)"
    if progress.rate is not None:
        text += f", {count(progress.rate)} res/s"
    if progress.seconds_left is not None and progress.residues_done < progress.residues_total:
        text += f", {duration(progress.seconds_left)} left"
    return text


@contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give a function that shows bytes received, of all if that is known.

    As a bar on a terminal, elsewhere as a line a minute and one at the end.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    line, line_is_due = f"{name}: nothing", time.monotonic() + _SECONDS_BETWEEN_LINES

    def show(received: int, total: int | None) -> None:
        nonlocal line, line_is_due
        bar.total = total
        bar.update(received - bar.n)
        line = f"{name}: {size(received)}" + (f" of {size(total)}" if total else "")
        if not on_terminal and time.monotonic() >= line_is_due:
            note(line)
            line_is_due = time.monotonic() + _SECONDS_BETWEEN_LINES

    bar = tqdm(desc=name, unit="B", unit_scale=True, disable=not on_terminal, file=sys.stderr)
    with bar:
        yield show
    if not on_terminal:
        note(line)


def _width() -> int:
    # As wide as COLUMNS or the terminal says; no limit where nobody looks.
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return sys.maxsize


def _cell(value: object) -> str:
    return "" if value is None else printable(str(value))
