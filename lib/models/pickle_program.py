"""The program in a pickle, followed without running it: what it calls, and how much it asks for.

torch's own unpickler (weights_only) calls any function of its allow-list with any arguments, and
some of these make as much as they are asked for. Here a pickle may call only what a model needs, a
tensor must lie within its storage, a storage within the archive, and all copies together are no
larger than the pickle.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["RefusedPickleError", "check_pickle"]

# Callables whose result is a copy of their arguments, or nothing.
_COPIED = {
    "__builtin__ set",
    "argparse Namespace",
    "builtins set",
    "collections OrderedDict",
    "torch Size",
    "torch device",
}
_REBUILT = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"}
_META = "torch._utils _rebuild_meta_tensor_no_storage"
# These hold a tensor, and do not copy it.
_PARAMETERS = {
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
}
# What a state may be restored to; a tensor's state would be another storage.
_WITH_STATE = {"argparse Namespace", "collections OrderedDict"}
_STORAGE_BYTES = {
    "torch BFloat16Storage": 2,
    "torch BoolStorage": 1,
    "torch ByteStorage": 1,
    "torch CharStorage": 1,
    "torch ComplexDoubleStorage": 16,
    "torch ComplexFloatStorage": 8,
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch IntStorage": 4,
    "torch LongStorage": 8,
    "torch ShortStorage": 2,
    "torch.storage UntypedStorage": 1,
}


class RefusedPickleError(Exception):
    """A pickle that asks for more than a model needs; the message is a fact in one line."""


@dataclass(frozen=True)
class _Name:
    """What GLOBAL looks up: module and name, with a space between them."""

    name: str


@dataclass
class _Made:
    """The result of a call, or a list or dictionary; size: its items, letters or numbers."""

    by: str
    size: int = 0


@dataclass(frozen=True)
class _Storage:
    """A storage of the archive, of so many bytes and elements of so many bytes."""

    size: int
    item: int


def check_pickle(content: bytes, members: Mapping[str, int]) -> None:
    """Follow a pickle to its end.

    members: the bytes of every storage that the archive holds, by key. Raises RefusedPickleError
    for what a model does not need, and IndexError, KeyError or ValueError for a broken pickle.
    """
    program = _Program(members, len(content))
    for opcode, argument, _ in pickletools.genops(content):
        program.step(opcode.name, argument)


class _Program:
    """The stacks and the memo of a pickle that is followed, as torch's unpickler has them."""

    def __init__(self, members: Mapping[str, int], copied: int) -> None:
        self._members = members
        self._copies_left = self._copied = copied
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def step(self, opcode: str, argument: object) -> None:
        """Do to the stack what torch's unpickler does; it does not have other opcodes."""
        stack = self._stack
        if opcode == "GLOBAL":
            stack.append(_Name(str(argument)))
        elif opcode in _PUSHED:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_Made(_EMPTY[opcode]))
        elif opcode == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "TUPLE":
            self._stack = self._outer.pop()
            self._stack.append(tuple(stack))
        elif opcode in ("APPENDS", "SETITEMS"):
            self._stack = self._outer.pop()
            _grow(self._stack[-1], len(stack))
        elif opcode in _ADDED:
            del stack[-_ADDED[opcode] :]
            _grow(stack[-1], _ADDED[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif opcode == "BUILD":
            state = stack.pop()
            _refuse_state(stack[-1])
            self._copy(state if isinstance(state, tuple) else (state,))
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode not in ("PROTO", "STOP"):
            raise RefusedPickleError(f"its pickle has the opcode {opcode}")

    def _call(self, function: object, arguments: object) -> _Made:
        """Return what stands for the result of a call."""
        name = function.name if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise RefusedPickleError(f"its pickle calls {_shown(function)} without arguments")
        if name in _REBUILT:
            _refuse_beyond(arguments)
            return _Made(name, _numbers(arguments[2]))
        if name == _META:
            return _Made(name, _numbers(arguments[1]))
        if name in _PARAMETERS:
            return _Made(name, _size(arguments[0]))
        # With latin1, protocol 2 writes bytes; other encodings make more bytes than letters.
        if name not in _COPIED and (name != "_codecs encode" or arguments[1:] != ("latin1",)):
            raise RefusedPickleError(
                f"its pickle asks for {_shown(function)}, which is not in the allow-list"
            )
        return _Made(name, self._copy(arguments))

    def _copy(self, arguments: tuple[object, ...]) -> int:
        """Return how much a call may copy; raises RefusedPickleError if all is too much."""
        size = sum(map(_size, arguments))
        self._copies_left -= size
        if self._copies_left < 0:
            raise RefusedPickleError(f"its pickle copies more than its {self._copied} bytes")
        return size

    def _storage(self, key: object) -> _Storage:
        """Return the storage that a persistent id names, as large as the archive has it."""
        if not isinstance(key, tuple) or len(key) != 5:
            raise RefusedPickleError("its pickle names a storage in another way than torch.save")
        _, kind, name, _, elements = key
        if not isinstance(kind, _Name) or kind.name not in _STORAGE_BYTES:
            raise RefusedPickleError(f"its pickle has a storage of the kind {_shown(kind)}")
        item = _STORAGE_BYTES[kind.name]
        held = self._members.get(str(name), 0)
        if not isinstance(elements, int) or not 0 <= elements * item <= held:
            raise RefusedPickleError(
                f"its pickle asks for a storage {_text(name)} of {_text(elements)} x {item} "
                f"bytes, the archive has {held}"
            )
        return _Storage(elements * item, item)


_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS: dict[str, object] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADDED = {"APPEND": 1, "SETITEM": 2}


def _grow(target: object, items: int) -> None:
    if isinstance(target, _Made):
        target.size += items


def _size(value: object) -> int:
    """Return how many items, letters or numbers a copy of a value may have."""
    if isinstance(value, _Made):
        return value.size
    return len(value) if isinstance(value, tuple | str | bytes) else 0


def _numbers(shape: object) -> int:
    """Return how many numbers a tensor of a shape has."""
    if not isinstance(shape, tuple) or not all(isinstance(one, int) for one in shape):
        raise RefusedPickleError(f"its pickle has a tensor of shape {_text(shape)}")
    return math.prod(shape)


def _refuse_beyond(arguments: tuple[object, ...]) -> None:
    """Raise RefusedPickleError for a tensor that does not lie within its storage.

    arguments: storage, first element, shape, strides, and what does not matter here; for
    _rebuild_tensor_v3 the seventh is the type.
    """
    storage, start, shape, strides = (*arguments, None, None, None, None)[:4]
    if (
        not isinstance(storage, _Storage)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or len(shape) != len(strides)
    ):
        raise RefusedPickleError("its pickle has a tensor without a storage")
    if not all(isinstance(one, int) and one >= 0 for one in (start, *shape, *strides)):
        raise RefusedPickleError(f"its pickle has a tensor of shape {_text(shape)}")
    assert isinstance(start, int)
    steps = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    end = 0 if 0 in shape else start + steps + 1
    kind = arguments[6] if len(arguments) > 6 else None
    if end * _item(storage, kind) > storage.size:
        raise RefusedPickleError(
            f"its pickle has a tensor of shape {_text(shape)} in a storage of {storage.size} bytes"
        )


def _item(storage: _Storage, kind: object) -> int:
    """Return the bytes of an element: by the type of a tensor if it has one of its own."""
    name = kind.name.removeprefix("torch ") if isinstance(kind, _Name) else ""
    dtype = getattr(torch, name, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else storage.item


def _refuse_state(target: object) -> None:
    if not isinstance(target, _Made) or target.by not in _WITH_STATE:
        raise RefusedPickleError(f"its pickle restores the state of {_shown(target)}")


def _shown(value: object) -> str:
    """Return a name as torch writes it: builtins without their module."""
    if not isinstance(value, _Name | _Made):
        return f"a {type(value).__name__}"
    name = value.name if isinstance(value, _Name) else value.by
    return name.removeprefix("__builtin__ ").removeprefix("builtins ").replace(" ", ".")


def _text(value: object) -> str:
    return repr(value)[:80]
