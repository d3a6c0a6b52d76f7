"""Messages: what the driver of a run and its workers tell each other."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib import errors
from lib.errors import LedgerError
from lib.files import file_sha256, listing_sha256
from schema.version import VERSION

__all__ = ["Answer", "Failure", "Greeting", "Readiness", "own_versions"]

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "numpy", "pyarrow")


@dataclass(frozen=True)
class Greeting:
    """Where a worker is, and what it would compute with; `own_versions` gives `versions`."""

    host: str
    pid: int
    node: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host}"


@dataclass(frozen=True)
class Readiness:
    """A worker that has loaded its weights; config: the snapshot of an ESM2Config.

    attention: how it is computed, in words.
    """

    device: str
    device_name: str
    attention: str
    threads: int
    weights_path: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A LedgerError on its way from a worker to the driver."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: LedgerError) -> Failure:
        """Return an error as a message."""
        return cls(type(error).__name__, str(error))

    def error(self) -> LedgerError:
        """Return the error again; of a kind that is raised below `lib.errors`, its base."""
        kind = getattr(errors, self.kind, LedgerError)
        made: LedgerError = kind(self.message)
        return made


@dataclass(frozen=True)
class Answer:
    """The packs of a stretch that a worker has computed, in a finished file.

    packs: how many, from the first on; with 0 there is no file and `name` is empty. records,
    bytes, sha256: of the file. seconds: wall time. failure: why they are not all; None with fewer
    packs than were asked for: the worker was told to stop.
    """

    packs: int
    name: str = ""
    records: int = 0
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    failure: Failure | None = None


def own_versions() -> dict[str, str]:
    """Return the versions of all that can change a bit of a result, by name.

    `source` is a digest of this program's own modules: a checkout may differ from its version.
    """
    files = (path for room in ("lib", "schema") for path in (_ROOT / room).rglob("*.*"))
    modules = [path for path in files if path.suffix in (".py", ".cpp")]
    source = listing_sha256(
        (file_sha256(path), str(path.relative_to(_ROOT))) for path in sorted(modules)
    )
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "esm-ledger": VERSION,
        "source": source[:16],
    }
