"""Files of tensors as transformers and PEFT write them: .safetensors, or .bin by torch.save."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError, safe_open

from lib.errors import WeightsError
from lib.models.held_file import HeldFile
from lib.models.torch_archive import load_archive, refuse_inflated, tensor_info
from lib.models.weights import TensorInfo

__all__ = ["read_stored", "stored_tensors", "tensors_in"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_tensors(file: HeldFile, key: str | None = None) -> dict[str, TensorInfo]:
    """Return type and shape of every tensor of a file, by stored name.

    The file is a .safetensors, or one that torch.save wrote; key: where the dictionary of tensors
    is in that, if it is not the whole. Raises WeightsError for a file that is neither.
    """
    if file.path.suffix == ".safetensors":
        return _in_safetensors(file)
    state = _state_dict(file, key)
    refuse_inflated(state.values(), file)
    return {name: tensor_info(name, tensor, file.path) for name, tensor in state.items()}


def read_stored(
    file: HeldFile, wanted: Callable[[str], bool], key: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (stored name, tensor) for every name in the file that is `wanted`; key: as above."""
    if file.path.suffix == ".safetensors":
        with safe_open(file.open_path, framework="pt") as opened:
            for stored in filter(wanted, opened.keys()):
                yield stored, opened.get_tensor(stored)
    else:
        state = _state_dict(file, key)
        yield from ((stored, state[stored]) for stored in filter(wanted, state))


def _in_safetensors(file: HeldFile) -> dict[str, TensorInfo]:
    try:
        with safe_open(file.open_path, framework="pt") as opened:
            # The handle cannot be iterated over.
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(
                    _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
                )
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file.path}: {' '.join(str(error).split())}") from None


def _state_dict(file: HeldFile, key: str | None) -> dict[str, torch.Tensor]:
    archive = load_archive(file)
    state = archive if key is None else archive.get(key)
    tensors = tensors_in(state)
    if not tensors:
        raise WeightsError(f"{file.path}: holds no tensors")
    return tensors


def tensors_in(state: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a dictionary by their names; none, if it is not one."""
    entries = state.items() if isinstance(state, dict) else ()
    return {
        name: value
        for name, value in entries
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
