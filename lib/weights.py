"""Weights: where they lie, what their metadata says, and their tensors, read only when asked for.

A fair-esm `.pt` is a zip archive of torch.save with the keys `cfg` (an argparse.Namespace) and
`model` (a state dict). It is mapped, never read whole, and unpickled with weights_only=True and
argparse.Namespace as the only name allowed beside tensors.
"""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib import huggingface
from lib.catalog import RELEASED
from lib.digest import file_sha256
from lib.errors import LedgerError, WeightsError
from schema.settings import ModelSettings

__all__ = ["TensorInfo", "Weights", "find_weights", "hub_checkpoints", "open_weights"]

_PREFIX = re.compile(r"^(encoder\.sentence_encoder\.|encoder\.)")
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# GLOBAL opcodes; torch's unpickler has no other way to a name.
_MADE_BY_LENGTH = {"__builtin__ bytearray", "builtins bytearray", "torch Tensor"}
# fair-esm's own words for the properties, in cfg["model"].
_CFG_WORDS = {
    "num_layers": "encoder_layers",
    "hidden_dim": "encoder_embed_dim",
    "attention_heads": "encoder_attention_heads",
    "token_dropout": "token_dropout",
}


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """An ESM-2 model on disk, of which only metadata has been read.

    `metadata` holds the properties that the file's own configuration states, `tensors` what
    is stored, by fair-esm's names without prefix.
    """

    path: Path
    format: str
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    untrained: bool
    stamp: tuple[object, ...]

    def refuse_if_changed(self) -> None:
        """Raise WeightsError if the files on disk are not those whose metadata was read."""
        if _stamp(self.path) != self.stamp:
            raise WeightsError(f"{self.path}: changed while it was being read")

    def sha256(self) -> str:
        """Return the SHA-256 of the file, or of a folder's `sha256sum` listing of its files."""
        if self.format == "huggingface":
            return huggingface.folder_sha256(self.path)
        return file_sha256(self.path)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) as stored; the tensors are views of a mapping of the file.

        The mapping goes when the last of its tensors does: ask for a few at a time and let go
        of them, and the file's pages never add up to a second copy in memory.
        """
        if self.format == "huggingface":
            yield from huggingface.read_tensors(self.path, names)
            return
        state = _state_dict(_load_archive(self.path), self.path)
        for name in names:
            yield name, state[name]


def hub_checkpoints() -> Path:
    """Return the folder where torch hub, and so fair-esm, keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(model: ModelSettings) -> Path | None:
    """Return where the chosen model lies, or None for a released name that is not on disk.

    Raises WeightsError for a path that does not exist, and for a name that is neither.
    """
    if model.esm_model not in RELEASED:
        path = Path(model.esm_model)
        if not path.exists():
            raise WeightsError(
                f"esm_model {path}: no such file or folder, and {path.name!r} is not one of the "
                f"released names {', '.join(RELEASED)}"
            )
        return path
    folders = [Path(model.weights_directory)] if model.weights_directory else []
    for folder in [*folders, hub_checkpoints()]:
        path = folder / f"{model.esm_model}.pt"
        if path.is_file():
            return path
    return None


def open_weights(path: Path) -> Weights:
    """Read the metadata of the weights at `path`; no tensor data is read.

    Raises WeightsError, in one line, for whatever is not an ESM-2 model.
    """
    stamp = _stamp(path)
    if path.is_dir():
        metadata, tensors, untrained = huggingface.read_metadata(path)
        infos = {name: TensorInfo(dtype, shape) for name, (dtype, shape) in tensors.items()}
        return Weights(path, "huggingface", metadata, infos, untrained, stamp)
    archive = _load_archive(path)
    _refuse_relatives(archive, path)
    state = _state_dict(archive, path)
    cfg = _cfg(archive)
    metadata = {key: cfg[word] for key, word in _CFG_WORDS.items() if word in cfg}
    infos = {name: _info(name, tensor, path) for name, tensor in state.items()}
    _refuse_inflated(state, path)
    return Weights(path, "fair-esm", metadata, infos, cfg.get("untrained") is True, stamp)


def _stamp(path: Path) -> tuple[object, ...]:
    """Return what changes when a file, or a file of a folder, is written or replaced."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, is_.st_ino, is_.st_size, is_.st_mtime_ns) for name, is_ in found)


def _load_archive(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: neither a file nor a folder")
        if not zipfile.is_zipfile(path):
            raise WeightsError(f"{path}: truncated, or not a torch.save archive (no zip directory)")
        _refuse_bombs(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what a hostile pickle makes torch say of itself
            archive = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (LedgerError, MemoryError):
        raise
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # hostile bytes can make the unpickler raise anything
        raise WeightsError(f"{path}: refused: {_unpickling_fact(str(error))}") from None
    if not isinstance(archive, dict):
        raise WeightsError(f"{path}: holds a {type(archive).__name__}, not a dictionary")
    return archive


def _refuse_bombs(path: Path) -> None:
    """Refuse an archive that would ask for memory of any size before its tensors are counted.

    torch's own allow-list has types that are made by length, and its reader inflates members.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise WeightsError(f"{path}: member {member.filename} is compressed")
            if member.filename.endswith("data.pkl"):
                for _, argument, _ in pickletools.genops(archive.read(member)):
                    if argument in _MADE_BY_LENGTH:
                        name = str(argument).replace(" ", ".")
                        raise WeightsError(
                            f"{path}: refused: its pickle asks for {name}, which is not in the "
                            "allow-list"
                        )


def _unpickling_fact(message: str) -> str:
    """Return what is wrong, out of the paragraphs of advice that torch puts around it."""
    asked = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", message)
    if asked and re.search("unsupported", message, re.IGNORECASE):
        return f"its pickle asks for {asked[1]}, which is not in the allow-list"
    inner = message.partition("WeightsUnpickler error:")[2] or message
    advice = re.compile("weights_only|torch.load|Please|documentation")
    facts = [line.strip() for line in inner.splitlines() if not advice.search(line)]
    fact = next(filter(None, facts), "").partition(" This is an internal")[0]
    # A lone word is what a KeyError of the unpickler says of a broken stream.
    return fact[:300] if " " in fact else "its pickle is broken"


def _cfg(archive: Mapping[str, Any]) -> dict[str, object]:
    cfg = archive.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else getattr(cfg, "model", None)
    if isinstance(model, argparse.Namespace):
        return dict(vars(model))
    return model if isinstance(model, dict) else {}


def _state_dict(archive: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    state = archive.get("model", archive)
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: its 'model' is a {type(state).__name__}, not a state dict")
    tensors = {
        _PREFIX.sub("", name): value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def _refuse_relatives(archive: Mapping[str, Any], path: Path) -> None:
    """Refuse the other models of the family by what only they have."""
    args = archive.get("args")
    arch = str(getattr(args, "arch", "")) if isinstance(args, argparse.Namespace) else ""
    names = " ".join(_state_dict(archive, path))
    relatives = {
        "ESM-IF": ("invariant_gvp" in arch, r"\S*gvp\S*|\S*W_v\.\S*|\S*embed_confidence\S*"),
        "MSA Transformer": (
            arch == "msa_transformer",
            r"msa_position_embedding|\S*row_self_attention\S*",
        ),
        "ESM-1b or ESM-1v": (arch == "roberta_large", r"embed_positions\.weight"),
        "ESM-1": (arch == "protein_bert_base", r"embed_out\b\S*"),
    }
    for relative, (by_arch, marker) in relatives.items():
        found = re.search(marker, names)
        if by_arch or found:
            what = f"arch {arch}" if by_arch else f"tensor {found[0] if found else ''}"
            raise WeightsError(f"{path}: an {relative} model ({what}), not ESM-2")


def _info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    plain = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    if not plain or not tensor.is_contiguous():
        raise WeightsError(f"{path}: tensor {name} is not stored whole (strided or sparse)")
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return TensorInfo(dtype, tuple(tensor.shape))


def _refuse_inflated(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that claim more bytes than the file has, but for the one tied pair."""
    counted = dict(tensors)
    head, embedding = counted.get("lm_head.weight"), counted.get("embed_tokens.weight")
    if head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
        del counted["lm_head.weight"]
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in counted.values())
    held = path.stat().st_size
    if claimed > held:
        raise WeightsError(f"{path}: tensors claim {claimed} bytes, the file has {held}")
