"""What torch.save wrote: opened without running anything in it, and without reading tensor data."""

from __future__ import annotations

import argparse
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.errors import LedgerError, WeightsError

__all__ = ["TensorInfo", "load_archive", "refuse_inflated", "tensor_info"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# GLOBAL opcodes; torch's unpickler has no other way to a name.
_MADE_BY_LENGTH = {"__builtin__ bytearray", "builtins bytearray", "torch Tensor"}
# The one pair that shares its memory, by fair-esm's name of the head and by transformers'.
_TIED_HEADS = ("lm_head.weight", "lm_head.decoder.weight")


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


def load_archive(path: Path) -> dict[str, Any]:
    """Map the dictionary that torch.save wrote to `path`, allowing no name but argparse.Namespace.

    Raises WeightsError for whatever else it is, and for a pickle that asks for any other name.
    """
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


def tensor_info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    """Return what is stored as `name`; raises WeightsError if that is less than its shape."""
    plain = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    if not plain or not tensor.is_contiguous():
        raise WeightsError(f"{path}: tensor {name} is not stored whole (strided or sparse)")
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return TensorInfo(dtype, tuple(tensor.shape))


def refuse_inflated(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that claim more bytes than the file has, but for the one tied pair."""
    counted = dict(tensors)
    embedding = counted.get("embed_tokens.weight")
    for name in _TIED_HEADS:
        head = counted.get(name)
        if head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
            del counted[name]
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in counted.values())
    held = path.stat().st_size
    if claimed > held:
        raise WeightsError(f"{path}: tensors claim {claimed} bytes, the file has {held}")
