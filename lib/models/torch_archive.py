"""What torch.save wrote: opened without running anything in it, and without reading tensor data."""

from __future__ import annotations

import argparse
import re
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lib.errors import LedgerError, WeightsError
from lib.models.held_file import HeldFile
from lib.models.pickle_program import RefusedPickleError, check_pickle
from lib.models.weights import TensorInfo
from schema.esm2_config import VOCABULARY

__all__ = ["load_archive", "refuse_inflated", "tensor_info"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# What torch.save pickled first before torch 1.6, and does if asked for that format.
_OF_LEGACY_FILES = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
# A file is loaded again for every few tensors; its pickle is followed once.
_FOLLOWED: weakref.WeakSet[HeldFile] = weakref.WeakSet()


def load_archive(file: HeldFile) -> dict[str, Any]:
    """Map the dictionary that torch.save wrote to a file.

    Raises WeightsError if the file holds anything else, and if its pickle asks for any name other
    than argparse.Namespace and those of tensors.
    """
    path, opened = file.path, file.open_path
    try:
        if not zipfile.is_zipfile(opened):
            raise WeightsError(f"{path}: {_why_not_zip(opened)}")
        if file not in _FOLLOWED:
            _refuse_bombs(file)
            _FOLLOWED.add(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # a hostile pickle can make torch warn about itself
            archive = torch.load(opened, map_location="cpu", mmap=True, weights_only=True)
    except (LedgerError, MemoryError):
        raise
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # hostile bytes can make the unpickler raise anything
        raise WeightsError(f"{path}: refused: {_unpickling_fact(str(error))}") from None
    if not isinstance(archive, dict):
        raise WeightsError(f"{path}: holds a {type(archive).__name__}, not a dictionary")
    return archive


def _why_not_zip(opened: Path) -> str:
    with opened.open("rb") as file:
        head = file.read(64)
    if _OF_LEGACY_FILES in head:
        return "torch.save's format of before torch 1.6, not a zip archive"
    return "truncated, or not a torch.save archive (no zip directory)"


def _refuse_bombs(file: HeldFile) -> None:
    """Refuse an archive that could take any amount of memory before its tensors are counted.

    torch's own allow-list includes functions that make as much as they are asked for, and its
    reader inflates compressed members.
    """
    with zipfile.ZipFile(file.open_path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise WeightsError(f"{file.path}: member {member.filename} is compressed")
        for member in members:
            if member.filename.endswith("data.pkl"):
                folder = member.filename.removesuffix("data.pkl") + "data/"
                storages = {
                    one.filename.removeprefix(folder): min(one.file_size, file.size)
                    for one in members
                    if one.filename.startswith(folder)
                }
                _check_pickle(archive.read(member), storages, file.path)


def _check_pickle(content: bytes, storages: Mapping[str, int], path: Path) -> None:
    try:
        check_pickle(content, storages)
    except RefusedPickleError as error:
        raise WeightsError(f"{path}: refused: {error}") from None
    except (IndexError, KeyError, ValueError):
        raise WeightsError(f"{path}: refused: its pickle is broken") from None


def _unpickling_fact(message: str) -> str:
    """Return the fact from a message of torch, without the paragraphs of advice around it."""
    asked = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", message)
    if asked and re.search("unsupported", message, re.IGNORECASE):
        return f"its pickle asks for {asked[1]}, which is not in the allow-list"
    inner = message.partition("WeightsUnpickler error:")[2] or message
    advice = re.compile("weights_only|torch.load|Please|documentation")
    facts = [line.strip() for line in inner.splitlines() if not advice.search(line)]
    fact = next(filter(None, facts), "").partition(" This is an internal")[0]
    # From a broken stream the unpickler raises a KeyError, whose message is a single word.
    return fact[:300] if " " in fact else "its pickle is broken"


def tensor_info(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    """Return type and shape of a tensor; raises WeightsError if it is not stored as a whole."""
    plain = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    if not plain or not tensor.is_contiguous():
        raise WeightsError(f"{path}: tensor {name} is not stored whole (strided or sparse)")
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return TensorInfo(dtype, tuple(tensor.shape))


def refuse_inflated(tensors: Iterable[torch.Tensor], file: HeldFile) -> None:
    """Refuse tensors that claim more bytes than the file has; tied output heads are not counted.

    A head, whatever it is called, may be the memory of the token embedding in the same shape. Only
    tensors with a row per token are counted once for that: no tensor of a layer is one, since its
    sizes are even, and layers that share their memory would be any number of them.
    """
    claimed, per_token = 0, set()
    for tensor in tensors:
        if tensor.shape[:1] == (VOCABULARY,):
            view = tensor.data_ptr(), tensor.shape, tensor.dtype
            if view in per_token:
                continue
            per_token.add(view)
        claimed += tensor.numel() * tensor.element_size()
    if claimed > file.size:
        raise WeightsError(f"{file.path}: tensors claim {claimed} bytes, the file has {file.size}")
