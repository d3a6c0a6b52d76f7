"""Settings: config.ini with the flags laid over it, checked against schema.settings."""

from __future__ import annotations

import configparser
import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from marshmallow import ValidationError

from lib.catalog import RELEASED, named_on_hub
from lib.errors import SettingsError
from schema.settings import SECTIONS, STANDARD_INPUT, SettingsSchema, SettingsSections

__all__ = [
    "DEFAULT_CONFIG",
    "Overrides",
    "Settings",
    "expanded",
    "from_snapshot",
    "load_settings",
    "override",
    "snapshot",
]

Settings = SettingsSections
# "section.option" to text as in config.ini, or to a list of paths, which are taken as they are.
Overrides = Mapping[str, str | list[str]]

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "config.ini"

_SCHEMA = SettingsSchema()
_PATHS = (
    ("model", "esm_model"),
    ("model", "base_model"),
    ("model", "weights_directory"),
    ("output", "folder"),
    ("database", "url"),
)
# A SQLAlchemy URL with a relative path: what follows three slashes, up to a query.
_RELATIVE_URL = re.compile(r"(sqlite(?:\+pysqlite)?:///)(?!/|:memory:)([^?]+)(.*)", re.DOTALL)


def load_settings(
    config: Path = DEFAULT_CONFIG, overrides: Mapping[str, str | list[str]] = {}
) -> Settings:
    """Read config.ini, lay `overrides` over it and check every option.

    Relative paths in config.ini start at its folder, relative paths in `overrides` at the current
    folder; all are returned absolute. An option with an empty value counts as not set.

    Raises SettingsError, which names the section, the option and the value.
    """
    values = _resolve(_read_config(config), config.resolve().parent, str(config))
    return _check(_laid_over(values, overrides))


def override(settings: Settings, overrides: Overrides) -> Settings:
    """Return `settings` with `overrides` laid over them."""
    return _check(_laid_over(snapshot(settings), overrides))


def snapshot(settings: Settings) -> dict[str, Any]:
    """Return the settings as the JSON-ready dictionary that is stored with a run."""
    dumped: dict[str, Any] = _SCHEMA.dump(settings)
    return dumped


def from_snapshot(stored: object) -> Settings:
    """Return the settings of a snapshot; raises SettingsError if it is not one."""
    if not isinstance(stored, dict):
        raise SettingsError(f"stored settings are {type(stored).__name__}, not an object")
    for section, options in stored.items():
        if not isinstance(options, dict):
            raise SettingsError(f"stored settings: [{section}] is not an object")
    return _check(stored)


def _laid_over(
    values: Mapping[str, Mapping[str, Any]], overrides: Overrides
) -> dict[str, dict[str, Any]]:
    said: dict[str, dict[str, str | list[str]]] = {}
    for key, value in overrides.items():
        section, _, option = key.partition(".")
        said.setdefault(section, {})[option] = value
    _refuse_unknown(said, "flags")
    merged = {section: dict(options) for section, options in values.items()}
    for section, options in _resolve(said, Path.cwd(), "flags").items():
        merged.setdefault(section, {}).update(options)
    return merged


def _read_config(config: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(
        interpolation=None,
        delimiters=("=",),
        default_section="\0",  # so that [DEFAULT] is refused like any unknown section
    )
    try:
        with config.open(encoding="utf-8-sig") as lines:
            parser.read_file(lines, source=str(config))
    except FileNotFoundError:
        raise SettingsError(f"{config}: no such file") from None
    except OSError as error:
        raise SettingsError(f"{config}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{config}: not UTF-8 at byte {error.start}") from None
    except configparser.Error as error:
        raise SettingsError(" ".join(str(error).split())) from None
    values = {section: dict(parser.items(section)) for section in parser.sections()}
    _refuse_unknown(values, str(config))
    return values


def _refuse_unknown(values: Mapping[str, Mapping[str, object]], source: str) -> None:
    for section, options in values.items():
        if section not in SECTIONS:
            raise SettingsError(f"{source}: unknown section [{section}]")
        known = {field.name for field in dataclasses.fields(SECTIONS[section][1])}
        for option in options:
            if option not in known:
                raise SettingsError(f"{source}: unknown option {option!r} in [{section}]")


def _resolve(
    values: Mapping[str, Mapping[str, str | list[str]]], folder: Path, source: str
) -> dict[str, dict[str, Any]]:
    """Drop options with empty values and make paths absolute, starting at `folder`."""
    resolved: dict[str, dict[str, Any]] = {
        section: {
            option: value
            for option, value in options.items()
            if isinstance(value, list) or value.strip()
        }
        for section, options in values.items()
    }
    for section, option in _PATHS:
        value = resolved.get(section, {}).get(option)
        if value is None:
            continue
        place = f"{source}: [{section}] {option}"
        if option == "url" and "://" in value:
            resolved[section][option] = _absolute_url(value, folder, place)
            continue
        is_path = option == "url" or not _is_released(value)
        resolved[section][option] = _absolute(value, folder, place, is_path=is_path)
    fasta = resolved.get("input", {}).pop("fasta", None)
    paths = _paths_in(fasta, folder) if isinstance(fasta, str) else fasta or []
    place = f"{source}: [input] fasta"
    named = [path for path in paths if path.strip()]
    if named:
        resolved["input"]["fasta"] = [
            _absolute(path, folder, place, is_path=path != STANDARD_INPUT) for path in named
        ]
    return resolved


def _paths_in(text: str, folder: Path) -> list[str]:
    """Return the paths of an option that may have several.

    What leads to a file or folder as a whole is one path, blanks and quotes included. Else it is
    split into words as a shell splits them; what a shell could not split is one path.
    """
    if text == STANDARD_INPUT or _exists(text, folder):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote that does not end
        return [text]


def expanded(text: str) -> Path:
    """Return a path, `~` or `~NAME` at its start being a home folder; in `./~` it is a name.

    Raises RuntimeError if there is no user NAME.
    """
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def _exists(text: str, folder: Path) -> bool:
    try:
        return (folder / expanded(text)).exists()
    except (OSError, RuntimeError, ValueError):  # too long, ~NAME without a user, a NUL byte
        return False


def _absolute(value: str, folder: Path, place: str, *, is_path: bool) -> str:
    if "\0" in value:
        raise SettingsError(f"{place} has a NUL byte")
    if not is_path:
        return value
    try:
        return str((folder / expanded(value)).absolute())
    except RuntimeError as error:  # ~NAME, but there is no user NAME
        raise SettingsError(f"{place} = {value}: {error}") from None


def _absolute_url(url: str, folder: Path, place: str) -> str:
    relative = _RELATIVE_URL.fullmatch(url)
    if relative is None:
        return _absolute(url, folder, place, is_path=False)
    start, path, query = relative.groups()
    return start + quote(_absolute(unquote(path), folder, place, is_path=True)) + query


def _take_source_of_hub_names(model: dict[str, Any]) -> None:
    """Turn `facebook/NAME` into the released name and the source that it says.

    The source is that of esm_model, or of base_model where esm_model is a path.
    """
    options = ["esm_model"]
    if not _is_released(str(model.get("esm_model"))):
        options.append("base_model")
    for option in options:
        name = named_on_hub(str(model.get(option)))
        if name is not None:
            model |= {option: name, "source": "huggingface"}


def _is_released(value: str) -> bool:
    return value in RELEASED or named_on_hub(value) is not None


def _check(values: Mapping[str, Any]) -> Settings:
    # Relative default paths start at the project's folder, as those in its config.ini do.
    filled = {section: dict(values.get(section) or {}) for section in (*SECTIONS, *values)}
    filled["output"].setdefault("folder", str(DEFAULT_CONFIG.parent / "embeddings"))
    filled["database"].setdefault("url", str(DEFAULT_CONFIG.parent / "runs.sqlite"))
    _take_source_of_hub_names(filled["model"])
    try:
        settings: Settings = _SCHEMA.load(filled)
    except ValidationError as error:
        raise SettingsError(_first_fault(error, filled)) from None
    layers = settings.model.repr_layers
    if layers is not None and len(set(layers)) < len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise SettingsError(f"[model] repr_layers: {twice} is repeated")
    include = settings.output.include
    if len(set(include)) < len(include):
        twice_kept = next(word for word in include if include.count(word) > 1)
        raise SettingsError(f"[output] include: {twice_kept} is repeated")
    return settings


def _first_fault(error: ValidationError, values: Mapping[str, Mapping[str, Any]]) -> str:
    section, faults = next(iter(error.messages_dict.items()))
    if not isinstance(faults, dict):
        return f"[{section}]: {faults[0]}"
    option, messages = next(iter(faults.items()))
    while isinstance(messages, dict):  # a list option: {index: [messages]}
        messages = next(iter(messages.values()))
    value = values.get(section, {}).get(option)
    said = " ".join(map(str, value)) if isinstance(value, list) else value
    fact = str(messages[0]).rstrip(".").replace("Must be", "must be").replace("Not a", "not a")
    return f"[{section}] {option} = {said}: {fact}"
