"""Units: durations, sizes, counts and times written for people, and text that is safe to print."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

__all__ = [
    "count",
    "counted",
    "duration",
    "first_within",
    "in_words",
    "moment",
    "printable",
    "records",
    "seconds_between",
    "shortened_to",
    "size",
]


def count(number: float) -> str:
    """Return a number with commas between thousands, and one decimal only below 10."""
    return f"{number:,.1f}" if 0 < abs(number) < 10 and number % 1 else f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds in their two largest units: `9.4 s`, `3 min 5 s`, `2 h 0 min`, `4 d 7 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24} h"


def printable(text: str) -> str:
    """Return a text with U+FFFD for each character that cannot be printed.

    Headers and ids come from files that strangers wrote: a control character in them could end
    a line, move the cursor or reverse the reading direction.
    """
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def counted(number: float, noun: str) -> str:
    """Return a number of things in words: `1 checkpoint`, `2,000 checkpoints`."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def records(number: float) -> str:
    """Return a number of records in words: `1 record`, `2,000 records`."""
    return counted(number, "record")


def size(number: float) -> str:
    """Return bytes in decimal units, as disk makers count them: `512 B`, `160.0 kB`, `2.6 GB`."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:,.1f} PB"


def first_within(width: int, texts: Sequence[str]) -> str:
    """Return the first text that has at most `width` characters, or else the last."""
    return next((text for text in texts if len(text) <= width), texts[-1])


def shortened_to(width: int, text: str) -> str:
    """Return a text with at most `width` characters: beginning and end, with `…` between them."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: max(0, width - 1 - end)]}…{text[len(text) - end :]}"[: max(0, width)]


def moment(text: str) -> str:
    """Return a UTC ISO 8601 time as `2026-05-31 14:05:09`, and any other text unchanged."""
    parsed = _parsed(text)
    return text if parsed is None else f"{parsed:%Y-%m-%d %H:%M:%S}"


def seconds_between(start: str | None, stop: str | None) -> float | None:
    """Return the seconds between two ISO 8601 times, or None if either is missing or malformed.

    0 if the second is the earlier: the clock was set back in between.
    """
    first, last = _parsed(start), _parsed(stop)
    return None if first is None or last is None else max(0.0, (last - first).total_seconds())


def _parsed(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:  # another program may have written the row
        return None


def in_words(value: object) -> str:
    """Return a property's value as messages show it: `yes` or `no` for a bool."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
