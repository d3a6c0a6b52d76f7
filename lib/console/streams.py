"""Streams: stdout and stderr of a script, so that it ends for no reason of theirs alone."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import TextIO

__all__ = ["give_up_stdout", "settle_streams"]


def settle_streams() -> None:
    """Make stdout and stderr such that a script can print whatever it has to tell.

    A stream that the shell has closed (`>&-`) leads nowhere. What stderr cannot take is lost. A
    character that the encoding of stdout lacks is written as JSON escapes it.
    """
    codecs.register_error("escaped", _escaped)
    sys.stdout = _settled(sys.stdout, 1, io.FileIO, "escaped")
    sys.stderr = _settled(sys.stderr, 2, _LossyFile, "backslashreplace")


def give_up_stdout() -> None:
    """Drop what stdout cannot take, so that Python does not write it again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        _lead_nowhere(1)


class _LossyFile(io.FileIO):
    """A file that loses what cannot be written to it: a log on a full disk must end no run."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _settled(stream: TextIO | None, number: int, file: type[io.FileIO], errors: str) -> TextIO:
    if stream is None:
        _lead_nowhere(number)
    return io.TextIOWrapper(
        io.BufferedWriter(file(number, "w", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors=errors,
        # On a terminal, or where Python is told so (-u), a line is shown as soon as it ends.
        line_buffering=any(
            getattr(stream, how, False) for how in ("line_buffering", "write_through")
        ),
    )


def _lead_nowhere(number: int) -> None:
    """Open os.devnull under the number of a stream: another file must not get that number."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return the characters at fault as `\\u00e9`, which is good JSON and plain to read."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
