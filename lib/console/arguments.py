"""Arguments: the flags of the scripts, and the options of config.ini that they override."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lib.errors import LedgerError, SettingsError
from lib.settings import DEFAULT_CONFIG, Overrides, Settings, expanded, load_settings
from schema.settings import ClusterSettings

__all__ = [
    "arguments",
    "cluster_settings",
    "database_url",
    "folder_argument",
    "folder_of_run",
    "given_path",
    "overrides",
    "run_number",
    "settings_arguments",
    "whole_number",
]

# Flag to the option of config.ini that it overrides.
_FLAGS = {
    "esm_model": "model.esm_model",
    "repr_layers": "model.repr_layers",
    "input": "input.fasta",
    "output": "output.folder",
    "include": "output.include",
    "reuse": "output.reuse",
    "database": "database.url",
    "ray": "cluster.ray",
}


def arguments(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of every script: --config, --database and --json."""
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


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a type of arguments: whole numbers from `least` to `most`."""

    def number(text: str) -> int:
        try:
            value: int | None = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: not a whole number from {least} to {most}")
        return value

    return number


run_number = whole_number(1, (1 << 63) - 1)  # the largest of SQLite


def settings_arguments(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Add --set and the named flags, which override config.ini."""
    group = parser.add_argument_group("overriding config.ini")
    helps = {
        "esm_model": ("MODEL", "a released name in full, facebook/NAME, or the path of weights"),
        "output": ("FOLDER", "the folder that gets a folder for every run"),
        "ray": ("ADDRESS", "compute on a Ray cluster: HOST:PORT, or auto (docs/cluster.md)"),
    }
    for flag, (metavar, explanation) in helps.items():
        if flag in flags:
            option = f"--{flag.replace('_', '-')}"
            group.add_argument(option, metavar=metavar, help=explanation)
    if "input" in flags:
        group.add_argument(
            "--input",
            nargs="+",
            action="extend",
            metavar="FASTA",
            help="FASTA files, folders of them, or - for standard input: one input, in this order",
        )
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
    if "reuse" in flags:
        group.add_argument(
            "--reuse",
            action=argparse.BooleanOptionalAction,
            help="copy what earlier runs embedded, or compute everything",
        )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.OPTION=VALUE",
        help="any option of config.ini",
    )


def folder_argument(parser: argparse.ArgumentParser) -> None:
    """Add --output, which `folder_of_run` reads."""
    parser.add_argument(
        "--output",
        dest="folder_of_run",
        metavar="FOLDER",
        help="where the run's folder lies now, or the folder that it is in",
    )


def folder_of_run(parsed: argparse.Namespace) -> Path | None:
    """Return the folder that --output names; None: where the database says."""
    return given_path(parsed.folder_of_run)


def given_path(said: str | None) -> Path | None:
    """Return a path of the command line, absolute; None if there is none."""
    if said is None:
        return None
    try:
        return expanded(said).absolute()
    except RuntimeError as error:  # ~NAME, but there is no user NAME
        raise SettingsError(f"{said}: {error}") from None


def overrides(parsed: argparse.Namespace) -> dict[str, str | list[str]]:
    """Return the overrides as "section.option" to text; a flag takes precedence over --set.

    The paths of --input stay a list: the shell has split them.
    """
    said: dict[str, str | list[str]] = {}
    for setting in getattr(parsed, "set", []):
        key, equals, value = setting.partition("=")
        if not equals or "." not in key:
            raise LedgerError(f"--set {setting}: not section.option=value")
        said[key.strip()] = value
    for flag, key in _FLAGS.items():
        value = getattr(parsed, flag, None)
        if value is None:
            continue
        if flag == "input":
            said[key] = value
        else:
            said[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return said


def database_url(parsed: argparse.Namespace) -> str:
    """Return the run database that --database, --set or else config.ini names."""
    return _section_today(parsed, "database").database.url


def cluster_settings(parsed: argparse.Namespace) -> ClusterSettings:
    """Return the [cluster] of config.ini as it is today, with --ray and --set laid over it."""
    return _section_today(parsed, "cluster").cluster


def _section_today(parsed: argparse.Namespace, section: str) -> Settings:
    """Return config.ini as it is today, with what flags and --set say of one section."""
    said: Overrides = {
        key: value for key, value in overrides(parsed).items() if key.startswith(f"{section}.")
    }
    return load_settings(parsed.config, said)
