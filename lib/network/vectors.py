"""Vectors: what is kept of the sequences of a pack, computed within the memory there is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib.columns import Column, Vectors
from lib.errors import LedgerError, MachineError
from lib.network import pooling
from lib.network.contacts import ContactMaps
from lib.network.esm2 import Network
from lib.network.groups import group_equal_lengths
from lib.network.linear import rows_of
from lib.network.memory import available_bytes, contact_bytes, kept_bytes, pack_bytes, ran_out
from lib.sequences.alphabet import tokenise
from lib.sequences.windows import Sequence as FastaSequence
from lib.units import size
from schema.parquet import CONTACTS, VectorColumn

__all__ = ["Launched", "NoRoomError", "NonFiniteError", "kept_on_host", "launch", "needed_bytes"]

_CONTACT_MAPS = VectorColumn(CONTACTS)


class NonFiniteError(LedgerError):
    """The network gave NaN or infinity."""


class NoRoomError(MachineError):
    """The memory that is left does not suffice for a record alone."""


class _AbandonedError(Exception):
    """Nobody waits for the pack any more."""


@dataclass(frozen=True)
class _Part:
    """Sequences that went through the network together, and what is kept of them.

    Of per_tok one (tokens, hidden_dim) tensor. `done` has passed when the tensors hold what was
    copied from a CUDA device; None on CPU, where they hold it already.
    """

    sequences: Sequence[FastaSequence]
    kept: Mapping[VectorColumn, torch.Tensor | list[torch.Tensor]]
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class Launched:
    """A pack on its way through the network; on CUDA it may still be computed."""

    _parts: Sequence[_Part]

    def collect(self) -> Vectors:
        """Wait for the vectors; raises NonFiniteError naming the first record and layer with NaN
        or infinity.
        """
        vectors = [_collect_part(part) for part in self._parts]
        return functools.reduce(Vectors.joined, vectors)


def launch(
    network: Network,
    sequences: Sequence[FastaSequence],
    columns: Sequence[VectorColumn],
    per_tok_dtype: str,
    abandoned: threading.Event | None = None,
) -> Launched:
    """Send a pack through the network, keeping `columns` of it.

    A pack that does not fit into the device's memory is computed in halves. Raises NoRoomError
    naming a record that does not fit even so. Another thread may set `abandoned`: then nobody
    collects the pack, and it ends after the layer that is being computed.
    """
    lacking = _lacking(network, sequences, columns)
    try:
        if lacking is not None:
            raise MemoryError
        return Launched([_launch_part(network, sequences, columns, per_tok_dtype, abandoned)])
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    if len(sequences) == 1:
        owner, length = sequences[0].owners[0], len(sequences[0].residues)
        needed = size(needed_bytes(network, sequences, columns))
        fact = lacking or f"{needed} of memory on {network.device}"
        raise NoRoomError(f"record {owner.number} ({owner.id}): {length} residues need {fact}")
    middle = len(sequences) // 2
    halves = sequences[:middle], sequences[middle:]
    parts = [launch(network, half, columns, per_tok_dtype, abandoned)._parts for half in halves]
    return Launched([*parts[0], *parts[1]])


def needed_bytes(
    network: Network, sequences: Sequence[FastaSequence], columns: Sequence[VectorColumn]
) -> int:
    """Return an upper estimate of the memory of the device that a pack takes beside the weights."""
    lengths = [len(sequence.residues) for sequence in sequences]
    tokens = rows_of(sum(lengths) + 2 * len(lengths), network.device, network.dtype)
    maps = contact_bytes(lengths) if _CONTACT_MAPS in columns else 0
    # A GPU holds what is kept only while it converts it.
    kept = 0 if network.device.type == "cuda" else kept_on_host(network, sequences, columns)
    return pack_bytes(tokens, network.shape.hidden_dim) + maps + kept


def kept_on_host(
    network: Network, sequences: Sequence[FastaSequence], columns: Sequence[VectorColumn]
) -> int:
    """Return an upper estimate of the memory that the per-token vectors of a pack take."""
    tokens = sum(len(sequence.residues) + 2 for sequence in sequences)
    layers = sum(column.kind == "per_tok" for column in columns)
    return kept_bytes(tokens, network.shape.hidden_dim, layers, network.device)


def _lacking(
    network: Network, sequences: Sequence[FastaSequence], columns: Sequence[VectorColumn]
) -> str | None:
    """Return what a pack needs and where it is not there; None if it is, as far as is known."""
    wanted = [(network.device, needed_bytes(network, sequences, columns))]
    if network.device.type == "cuda":
        wanted.append((torch.device("cpu"), kept_on_host(network, sequences, columns)))
    for device, needed in wanted:
        # A pack is halved before it drives code out of memory, a record is refused only after that.
        available = available_bytes(device, needed, at_most=len(sequences) == 1)
        if available is not None and needed > available:
            return f"{size(needed)} of memory, {size(available)} are available on {device}"
    return None


def _launch_part(
    network: Network,
    sequences: Sequence[FastaSequence],
    columns: Sequence[VectorColumn],
    per_tok_dtype: str,
    abandoned: threading.Event | None,
) -> _Part:
    lengths = [len(sequence.residues) for sequence in sequences]
    groups = group_equal_lengths(lengths)
    tokens = torch.from_numpy(tokenise([sequence.residues for sequence in sequences]))
    on_cuda = network.device.type == "cuda"  # then copies come back through pinned memory
    by_layer: dict[int, list[VectorColumn]] = {}
    maps = None
    if _CONTACT_MAPS in columns:
        assert network.regression is not None
        maps = ContactMaps(network.regression, groups, network.device)
    for column in columns:
        if column.layer is not None:
            by_layer.setdefault(column.layer, []).append(column)
    kept: dict[VectorColumn, torch.Tensor | list[torch.Tensor]] = {}
    last = max(by_layer, default=0) if maps is None else network.shape.num_layers
    with torch.inference_mode():
        for layer, hidden in network.forward(tokens, lengths, range(last + 1), maps):
            if abandoned is not None and abandoned.is_set():
                raise _AbandonedError
            for column in by_layer.get(layer, []):
                if column.kind == "per_tok":
                    # One copy for the pack: what the network yields is overwritten.
                    dtype = getattr(torch, per_tok_dtype)
                    kept[column] = hidden.to("cpu", dtype, copy=True, non_blocking=on_cuda)
                else:
                    pool = pooling.mean if column.kind == "mean" else pooling.bos
                    kept[column] = pool(hidden, groups).to("cpu", non_blocking=on_cuda)
        if maps is not None:
            kept[_CONTACT_MAPS] = [one.to("cpu", non_blocking=on_cuda) for one in maps.finish()]
    done = None
    if on_cuda:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(network.device))
    return _Part(sequences, kept, done)


def _collect_part(part: _Part) -> Vectors:
    if part.done is not None:
        part.done.synchronize()
    groups = group_equal_lengths([len(sequence.residues) for sequence in part.sequences])
    columns: dict[VectorColumn, Column] = {}
    for name, kept in part.kept.items():
        if name.kind == "per_tok":
            assert isinstance(kept, torch.Tensor)
            kept = pooling.per_tok(kept, groups)
        columns[name] = [one.numpy() for one in kept] if isinstance(kept, list) else kept.numpy()
        _refuse_non_finite(columns[name], part.sequences, name)
    return Vectors(columns)


def _refuse_non_finite(
    kept: Column, sequences: Sequence[FastaSequence], column: VectorColumn
) -> None:
    if not isinstance(kept, list) and np.isfinite(kept).all():
        return
    for sequence, vector in zip(sequences, kept, strict=True):
        if not np.isfinite(vector).all():
            owner = sequence.owners[0]
            of_layer = "" if column.layer is None else f" of layer {column.layer}"
            place = f"{column.kind}{of_layer}"
            raise NonFiniteError(f"record {owner.number} ({owner.id}): non-finite value in {place}")
