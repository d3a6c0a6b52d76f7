"""The Hugging Face Hub: released models found in its cache, and fetched at their known commits.

Everything goes through huggingface_hub, which reads HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and
HF_HUB_OFFLINE. It is imported where it is used: other scripts need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.catalog import RELEASED, HubFiles, PublishedFile, hub_name
from lib.errors import MachineError, SettingsError, WeightsError
from lib.models.released import refuse_unpublished
from lib.models.transfer import Progress

__all__ = ["cached_model", "fetch_model", "hub_cache", "hub_files", "hub_url"]


def hub_files(name: str) -> HubFiles:
    """Return what the Hub has of a released model; raises SettingsError if that is not known."""
    files = RELEASED[name].hub
    if files is None:
        raise SettingsError(f"{hub_name(name)}: no commit and digest of it on the Hub are known")
    return files


def hub_url(files: HubFiles) -> str:
    """Return the address of a model at its commit."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{files.repository}/resolve/{files.revision}"


def hub_cache() -> Path:
    """Return the folder where the Hub's files are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_model(name: str) -> Path | None:
    """Return the folder of a released model in the Hub's cache; None if a file of it is missing.

    Raises SettingsError for a model that is not known on the Hub.
    """
    files = hub_files(name)
    folder = _folder(files)
    wanted = [*files.others, *(file.name for file in files.weights)]
    return folder if all((folder / name).is_file() for name in wanted) else None


def fetch_model(name: str, progress: Progress) -> Path:
    """Fetch what the Hub's cache lacks of a released model; return its folder.

    `progress` is told the bytes so far and in all, of the weights. A file of weights that is not
    the published one is kept under another name. Raises WeightsError for it, MachineError if
    network or disk fail or the environment forbids the network.
    """
    files = hub_files(name)
    total = sum(file.bytes or 0 for file in files.weights)
    folder, before = _folder(files), 0
    for other in files.others:
        _fetch(files, other, None)
    for file in files.weights:
        if not (folder / file.name).is_file():
            _fetch(files, file.name, _teller(progress, before, total))
            _verify(folder / file.name, file, f"{hub_url(files)}/{file.name}")
        before += file.bytes or 0
        progress(before, total)
    return folder


def _folder(files: HubFiles) -> Path:
    """Return where the cache has the files of the commit."""
    # Not by try_to_load_from_cache: a server that once answered another commit has left a reference
    # there by which that commit's files would be found.
    from huggingface_hub.file_download import repo_folder_name

    repository = repo_folder_name(repo_id=files.repository, repo_type="model")
    return hub_cache() / repository / "snapshots" / files.revision


def _fetch(files: HubFiles, name: str, bar: type[Any] | None) -> None:
    from huggingface_hub import hf_hub_download

    url = f"{hub_url(files)}/{name}"
    with _hub_errors(url):
        hf_hub_download(files.repository, name, revision=files.revision, tqdm_class=bar)
    if not (_folder(files) / name).is_file():
        raise MachineError(f"{url}: the server answered with another commit")


def _verify(path: Path, published: PublishedFile, url: str) -> None:
    """Refuse a file in the cache that is not the published one; what links to it is removed."""
    blob = path.resolve()
    try:
        refuse_unpublished(blob, published, blob.with_name(published.name))
    except WeightsError as error:
        if path.is_symlink():  # to a name that is gone
            path.unlink()
        raise WeightsError(f"{url}: {error}") from None
    except OSError as error:
        raise MachineError(f"{blob}: {error.strerror or error}") from None


@contextmanager
def _hub_errors(url: str) -> Iterator[None]:
    """Turn errors of huggingface_hub, the network and the disk into a MachineError of one line."""
    try:
        yield
    except Exception as error:  # also of the libraries that huggingface_hub is built on
        raise MachineError(f"{url}: {_fact(error)}") from None


def _fact(error: BaseException) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _fact(error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        return f"HTTP status {error.response.status_code} {error.response.reason_phrase}"
    lines = str(error).splitlines()  # advice stands in the lines after the first
    return lines[0] if lines else type(error).__name__


def _teller(progress: Progress, before: int, total: int) -> type[Any]:
    """Return a class of bars that draw nothing and tell `progress` how far a file is."""
    from tqdm import tqdm

    furthest = 0

    class Bar(tqdm):  # type: ignore[misc]
        # Several bars may show one file: received, and put together.
        def __init__(self, *args: object, **kwargs: Any) -> None:  # noqa: ANN401
            self.received = int(kwargs.get("initial") or 0)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.received += int(n or 0)
            furthest = max(furthest, self.received)
            progress(before + furthest, total)

    return Bar
