"""Released: weights are a published ESM-2 model if their digest says so; a name proves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.catalog import RELEASED, HubFiles, PublishedFile
from lib.errors import WeightsError
from lib.files import file_md5, file_sha256
from lib.models.adapted import AdaptedWeights
from lib.models.bare_tensors import SafetensorsFile
from lib.models.fair_esm_file import FairEsmFile
from lib.models.huggingface import HuggingFaceFolder
from lib.models.weights import Weights
from lib.units import in_words
from schema.esm2_config import ModelShape

__all__ = ["Proof", "prove", "refuse_false_name", "refuse_unpublished", "take_md5"]


@dataclass(frozen=True)
class Proof:
    """Whether weights are a released model: `model` is its name, or None if they are none.

    `by` is what decided: sha256 or md5; or, without a digest: adapter, shape,
    format, files or size.
    """

    model: str | None
    by: str

    @property
    def released(self) -> bool:
        """Whether the weights are a released model."""
        return self.model is not None

    def __str__(self) -> str:
        return f"{'yes' if self.released else 'no'} ({self.by})"


def prove(
    weights: Weights, shape: ModelShape, sha256: str | None = None, md5: str | None = None
) -> Proof | None:
    """Tell whether weights of this shape are a released model.

    sha256: the digest of the weights, if it is known. md5: what `take_md5` returns. Returns None
    if only a digest that is not given can tell. Raises OSError.
    """
    if isinstance(weights, AdaptedWeights):
        return Proof(None, "adapter")
    name = _name_of(shape)
    if name is None:
        return Proof(None, "shape")
    if isinstance(weights, FairEsmFile):
        return _prove_file(weights, name, RELEASED[name].file, sha256, md5)
    hub = RELEASED[name].hub
    if isinstance(weights, HuggingFaceFolder):
        return _prove_folder(weights, name, hub, sha256)
    if isinstance(weights, SafetensorsFile) and hub is not None and len(hub.weights) == 1:
        return _prove_file(weights, name, hub.weights[0], sha256, None)
    return Proof(None, "format")


def take_md5(weights: Weights, shape: ModelShape) -> str | None:
    """Return the MD5 of weights if the catalog has no SHA-256 to compare; raises OSError."""
    name = _name_of(shape)
    if not isinstance(weights, FairEsmFile) or name is None:
        return None
    published = RELEASED[name].file
    if published.algorithm != "md5" or not _sized(weights.file.size, published):
        return None
    return file_md5(weights.file.open_path)


def refuse_false_name(weights: Weights, shape: ModelShape) -> None:
    """Raise WeightsError for a path with the name of a released model that has another shape."""
    name = weights.path.name.removesuffix(".pt")
    if name not in RELEASED:
        return
    for key, published in vars(RELEASED[name].shape).items():
        found = getattr(shape, key)
        if found != published:
            raise WeightsError(
                f"{weights.path}: {key} is {in_words(found)}, that of {name} is "
                f"{in_words(published)}"
            )


def refuse_unpublished(part: Path, published: PublishedFile, target: Path) -> None:
    """Raise WeightsError if a file that was downloaded to be `target` is not the published one.

    The file is then kept beside `target`, under a name that says so and has its digest. Raises
    OSError.
    """
    digest = file_md5(part) if published.algorithm == "md5" else file_sha256(part)
    if digest == published.digest:
        return
    aside = target.with_name(f"{target.stem}-not-released-{digest[:8]}{target.suffix}")
    part.rename(aside)
    raise WeightsError(
        f"{published.algorithm} is {digest}, that of the published {published.name} is "
        f"{published.digest}; kept as {aside}"
    )


def _prove_file(
    weights: FairEsmFile | SafetensorsFile,
    name: str,
    published: PublishedFile,
    sha256: str | None,
    md5: str | None,
) -> Proof | None:
    if not _sized(weights.file.size, published):
        return Proof(None, "size")
    digest = md5 if published.algorithm == "md5" else sha256
    if digest is None:
        return None
    return Proof(name if digest == published.digest else None, published.algorithm)


def _prove_folder(
    weights: HuggingFaceFolder, name: str, hub: HubFiles | None, sha256: str | None
) -> Proof | None:
    if hub is None or [file.path.name for file in weights.files] != [
        one.name for one in hub.weights
    ]:
        return Proof(None, "files")
    pairs = zip(weights.files, hub.weights, strict=True)
    if not all(_sized(file.size, published) for file, published in pairs):
        return Proof(None, "size")
    if sha256 is None:
        return None
    # The folder's digest covers config.json too, so that only the whole can be compared.
    whole = weights.sha256_with({one.name: one.digest for one in hub.weights})
    return Proof(name if sha256 == whole else None, "sha256")


def _name_of(shape: ModelShape) -> str | None:
    """Return the name of the released model that has this shape."""
    return next((name for name, model in RELEASED.items() if model.shape == shape), None)


def _sized(size: int, published: PublishedFile) -> bool:
    return published.bytes is None or size == published.bytes
