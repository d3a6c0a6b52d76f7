"""Transfer: one file over HTTP, continued where an earlier transfer broke off."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from lib.errors import LedgerError, MachineError, WeightsError

__all__ = ["Progress", "ask_length", "transfer"]

Progress = Callable[[int, int | None], None]  # is told the bytes received so far and in all

_CHUNK = 1 << 20
_VERSION = "version"
# Seconds to wait before each retry of a broken connection. Progress resets the retry budget.
_PAUSES = (1.0, 4.0, 15.0, 60.0)


class _BrokenOffError(MachineError):
    """A connection ended before the whole file had arrived."""


def ask_length(url: str) -> int | None:
    """Return the length in bytes that a server states for a file, or None if it states none.

    Raises MachineError if there is no answer within ten seconds.
    """
    with _network_errors(url):
        with _ask(urllib.request.Request(url, method="HEAD"), seconds=10) as answer:
            length = answer.headers.get("Content-Length")
        return int(length) if length else None


def transfer(url: str, target: Path, verify: Callable[[Path], object], progress: Progress) -> None:
    """Bring the file at `url` to `target`, which gets its name only when it is whole and verified.

    verify: raises WeightsError if the file that it is given is not the one that was wanted; the
    file is then removed. If anything else ends a transfer, also while the file is verified, what
    was received is left in a hidden folder beside the target, `.download-NAME`, if the server
    stated a version (ETag or Last-Modified); the next transfer continues it if the server still has
    that version. A second process waits for the first. Raises MachineError if network or disk fail.
    """
    with _network_errors(url):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target) as part:
            if not target.is_file():  # the process that was waited for may have brought it
                _fetch(url, part, progress)
                _verify(verify, part, url)
                part.rename(target)


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn errors of network and disk into a MachineError that names the address."""
    try:
        yield
    except LedgerError:
        raise
    except urllib.error.HTTPError as error:
        raise MachineError(f"{url}: HTTP status {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise MachineError(f"{url}: {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise MachineError(f"{url}: {error}") from None


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """Hold the folder of a transfer alone and yield its part; keep it only to be continued."""
    folder = target.parent / f".download-{target.stem}"
    part = folder / target.name
    lock = _locked(folder)
    while lock is None:
        lock = _locked(folder)
    with lock:
        try:
            yield part
        finally:
            if not (part.exists() and part.with_name(_VERSION).exists()):
                shutil.rmtree(folder)


def _locked(folder: Path) -> IO[bytes] | None:
    """Make and lock a folder; return None if the process that held it before removed it."""
    folder.mkdir(exist_ok=True)
    path = folder / "lock"
    with suppress(FileNotFoundError):
        lock = path.open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                return lock
        lock.close()
    return None


def _verify(verify: Callable[[Path], object], part: Path, url: str) -> None:
    """Run `verify`; forget the version of a part that fails, so that it is not continued."""
    try:
        verify(part)
    except WeightsError as error:
        part.with_name(_VERSION).unlink(missing_ok=True)
        fact = str(error).replace(str(part), part.name)
        raise WeightsError(f"{url}: {fact}") from None


def _fetch(url: str, part: Path, progress: Progress) -> None:
    """Receive `url` into `part`; after a broken connection, pause and continue.

    If not a single byte has come since the call, there is no second try.
    """
    found = furthest = _size(part)
    pauses = iter(_PAUSES)
    while True:
        try:
            return _receive(url, part, progress)
        except (_BrokenOffError, urllib.error.URLError, HTTPException, OSError) as error:
            if _size(part) > furthest:
                furthest, pauses = _size(part), iter(_PAUSES)
            pause = next(pauses, None)
            if not _passes(error) or furthest == found or pause is None:
                raise
        time.sleep(pause)


def _passes(error: Exception) -> bool:
    """Return whether an error may pass: the network failed, or the server answered 5xx."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    kinds = _BrokenOffError | urllib.error.URLError | HTTPException | ConnectionError | TimeoutError
    return isinstance(error, kinds)


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Receive `url` into `part`, continuing where a transfer of the same version broke off."""
    version = part.with_name(_VERSION)
    known = version.read_text() if version.exists() and part.exists() else ""
    received = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={received}-", "If-Range": known} if received else {}
    try:
        answer = _ask(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the part is as long as the file, or longer
            raise
        if error.headers.get("Content-Range") == f"bytes */{received}":
            progress(received, received)
            return
        received = 0
        answer = _ask(urllib.request.Request(url))
    with answer:
        now = _version(answer.headers)
        begins = f"bytes {received}-"
        continued = answer.status == 206 and now == known
        if continued and not answer.headers.get("Content-Range", "").startswith(begins):
            raise MachineError(f"{url}: Content-Range is not {begins}")
        if answer.status == 206 and not continued:
            version.unlink(missing_ok=True)
            raise MachineError(f"{url}: changed since its download began")
        length = answer.headers.get("Content-Length")
        if known and answer.status == 200 and (now, length) == (known, str(received)):
            progress(received, received)  # a server without ranges
            return
        received = received if continued else 0
        total = received + int(length) if length else None
        if total is not None:
            _refuse_if_too_large(url, part, total)
        with part.open("ab" if continued else "wb") as file:
            version.unlink(missing_ok=True) if not now else version.write_text(now)
            while chunk := _read(answer):
                file.write(chunk)
                received += len(chunk)
                progress(received, total)
            file.flush()
            if chunk is None or (total is not None and received != total):
                whole = "an unknown number of" if total is None else total
                raise _BrokenOffError(f"{url}: broke off after {received} of {whole} bytes")
            os.fsync(file.fileno())


def _ask(request: urllib.request.Request, seconds: float = 60) -> HTTPResponse:
    """Send a request; redirects are followed. Raises what urllib does."""
    # A new opener each time: urlopen keeps the proxies of its first call.
    try:
        answer: HTTPResponse = urllib.request.build_opener().open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection of the answer that it stands for
        raise
    return answer


def _read(answer: HTTPResponse) -> bytes | None:
    """Return the next bytes, none at the end; None if the connection breaks."""
    try:
        return answer.read(_CHUNK)
    except (OSError, HTTPException):
        return None


def _refuse_if_too_large(url: str, part: Path, total: int) -> None:
    """Raise MachineError if the disk lacks room for the rest of `total` bytes."""
    there = _size(part)
    free = shutil.disk_usage(part.parent).free
    if total - there > free:
        raise MachineError(
            f"{url}: {total} bytes, {there} of them received, {free} free in {part.parent.parent}"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version(headers: Message) -> str:
    """Return what If-Range can name: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")
