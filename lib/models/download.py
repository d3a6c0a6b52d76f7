"""Download of released weights from fair-esm's published address."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from lib.errors import LedgerError, MachineError, WeightsError
from lib.models.detection import Detection, detect
from lib.models.formats import hub_checkpoints
from lib.models.regression import read_regression_file, regression_path
from schema.settings import ModelSettings

__all__ = [
    "Offer", "ask_size", "download_regression", "download_target", "download_weights",
]  # fmt: skip

_CHUNK = 1 << 20
_VERSION = "version"
# Seconds before a connection that broke off is tried again; who gets further has all of them anew.
_PAUSES = (1.0, 4.0, 15.0, 60.0)


@dataclass(frozen=True)
class Offer:
    """What a server offers: `size` in bytes, or None and `why_not`."""

    url: str
    target: Path
    size: int | None
    why_not: str


class _BrokenOffError(MachineError):
    """A connection ended before the whole file had come."""


def download_target(model: ModelSettings) -> Path:
    """Return where a download of the chosen released name is put."""
    folder = Path(model.weights_directory) if model.weights_directory else hub_checkpoints()
    return folder / f"{model.esm_model}.pt"


def ask_size(model: ModelSettings) -> Offer:
    """Ask what a download of the chosen released name is, and wait for an answer ten seconds."""
    url, target = _url(model), download_target(model)
    try:
        with _network_errors(url):
            with _ask(urllib.request.Request(url, method="HEAD"), seconds=10) as answer:
                length = answer.headers.get("Content-Length")
            return Offer(url, target, int(length) if length else None, "no Content-Length")
    except MachineError as error:
        return Offer(url, target, None, str(error).removeprefix(f"{url}: "))


def download_weights(model: ModelSettings, progress: Callable[[int, int | None], None]) -> Path:
    """Fetch the chosen released name; `progress` is told bytes so far and in all.

    The file takes its name only when it is whole and detected as the model of that name. What a
    broken download received stays in a hidden folder beside it, `.download-NAME`, if the server
    named its version (ETag or Last-Modified), and is continued by the next one if it still has
    that version. A second process waits for the first. Raises MachineError if the network or disk
    fails, WeightsError if it is not the model, which is then removed.
    """
    target = download_target(model)

    def verify(part: Path) -> None:
        detect(replace(model, weights_directory=str(part.parent)))

    _download(_url(model), target, verify, progress)
    return target


def download_regression(
    model: ModelSettings, detection: Detection, progress: Callable[[int, int | None], None]
) -> Path:
    """Fetch the contact regression of a released model that is on disk, to beside its file.

    fair-esm publishes it in the folder `regression` beside that of the models. Works and raises as
    `download_weights` does.
    """
    assert detection.weights is not None
    target = regression_path(detection.weights.unadapted.path)
    models = model.download_url.rstrip("/")
    url = f"{models.rpartition('/')[0]}/regression/{target.name}"
    layers, heads = detection.shape.num_layers, detection.shape.attention_heads

    def verify(part: Path) -> None:
        read_regression_file(part, layers, heads)

    _download(url, target, verify, progress)
    return target


def _download(
    url: str,
    target: Path,
    verify: Callable[[Path], object],
    progress: Callable[[int, int | None], None],
) -> None:
    with _network_errors(url):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent / f".download-{target.stem}") as folder:
            if not target.is_file():  # the process that was waited for may have brought it
                part = folder / target.name
                _fetch(url, part, progress)
                _verify(verify, part, url)
                part.rename(target)


def _url(model: ModelSettings) -> str:
    return f"{model.download_url.rstrip('/')}/{model.esm_model}.pt"


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn what network and disk refuse into a MachineError that names the address."""
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
def _alone(folder: Path) -> Iterator[Path]:
    """Hold a folder alone among processes; keep it only for a part that can be continued."""
    lock = _locked(folder)
    while lock is None:
        lock = _locked(folder)
    with lock:
        try:
            yield folder
        finally:
            if not (folder / _VERSION).exists():
                shutil.rmtree(folder)


def _locked(folder: Path) -> IO[bytes] | None:
    """Make and lock a folder; None if whoever held it before removed it."""
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
    """Raise WeightsError, and forget the part, if `verify` does."""
    version = part.with_name(_VERSION)
    try:
        verify(part)
    except WeightsError as error:
        fact = str(error).replace(str(part), part.name)
        raise WeightsError(f"{url}: {fact}") from None
    finally:
        version.unlink(missing_ok=True)


def _fetch(url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    """Receive `url` into `part`; where the connection breaks off, go on after a pause.

    A network that gives nothing from the beginning is not asked again.
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
    """Whether it may be over in a moment: the network's fault, or a server that is at its end."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    kinds = _BrokenOffError | urllib.error.URLError | HTTPException | ConnectionError | TimeoutError
    return isinstance(error, kinds)


def _receive(url: str, part: Path, progress: Callable[[int, int | None], None]) -> None:
    """Receive `url` into `part`, from where an earlier download of the same version broke off."""
    version = part.with_name(_VERSION)
    known = version.read_text() if version.exists() and part.exists() else ""
    received = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={received}-", "If-Range": known} if received else {}
    try:
        answer = _ask(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is as long as the file, or longer
            raise
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
        received = received if continued else 0
        length = answer.headers.get("Content-Length")
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
    # An opener of its own: urlopen keeps to the proxies of its first call.
    answer: HTTPResponse = urllib.request.build_opener().open(request, timeout=seconds)
    return answer


def _read(answer: HTTPResponse) -> bytes | None:
    """Return what comes next, empty at the end; None if the connection breaks."""
    try:
        return answer.read(_CHUNK)
    except (OSError, HTTPException):
        return None


def _refuse_if_too_large(url: str, part: Path, total: int) -> None:
    """Raise MachineError if the disk has no room for `total` bytes, of which `part` has some."""
    there = _size(part)
    free = shutil.disk_usage(part.parent).free
    if total - there > free:
        raise MachineError(
            f"{url}: {total} bytes, {there} of them received, {free} free in {part.parent.parent}"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version(headers: Message) -> str:
    """Return what If-Range may be asked with: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")
