"""Vectors: what is kept of the sequences of a pack, computed within the memory there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib import pooling
from lib.alphabet import tokenise
from lib.contacts import ContactMaps
from lib.errors import LedgerError, MachineError
from lib.fasta import Sequence as FastaSequence
from lib.memory import available_bytes, contact_bytes, pack_bytes
from lib.network import Network
from lib.packing import group_equal_lengths
from schema.parquet import CONTACTS

__all__ = ["NonFiniteError", "Vectors", "compute"]

Column = npt.NDArray[Any] | list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Vectors:
    """What is kept of a few sequences, by column name, in the order of the plan.

    `mean_L` and `bos_L` are (sequences, hidden_dim) float32 arrays, `per_tok_L` a list with
    one (residues, hidden_dim) array per sequence, `contacts` one with (residues, residues).
    """

    columns: Mapping[str, Column]


class NonFiniteError(LedgerError):
    """The network gave NaN or infinity."""


def compute(
    network: Network, sequences: Sequence[FastaSequence], columns: Sequence[str], per_tok_dtype: str
) -> Vectors:
    """Run a pack through the network and keep `columns` ("mean_6", "contacts", …) of it.

    A pack that does not fit into the device's memory is computed in halves. Raises MachineError
    naming a record that does not fit alone, NonFiniteError naming the first record and layer
    with NaN or infinity.
    """
    needed = _needed(network, sequences, columns)
    available = available_bytes(network.device)
    try:
        if available is not None and needed > available:
            raise MemoryError
        return _compute(network, sequences, columns, per_tok_dtype)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    if len(sequences) == 1:
        owner, length = sequences[0].owners[0], len(sequences[0].residues)
        raise MachineError(
            f"record {owner.number} ({owner.id}): {length} residues need {_gigabytes(needed)} of "
            f"memory, {_gigabytes(available)} are available on {network.device}"
        )
    middle = len(sequences) // 2
    return _joined(
        compute(network, sequences[:middle], columns, per_tok_dtype),
        compute(network, sequences[middle:], columns, per_tok_dtype),
    )


def _compute(
    network: Network, sequences: Sequence[FastaSequence], columns: Sequence[str], per_tok_dtype: str
) -> Vectors:
    lengths = [len(sequence.residues) for sequence in sequences]
    groups = group_equal_lengths(lengths)
    tokens = torch.from_numpy(tokenise([sequence.residues for sequence in sequences]))
    by_layer: dict[int, list[str]] = {}
    maps = None
    if CONTACTS in columns:
        assert network.regression is not None
        maps = ContactMaps(network.regression, groups, network.device)
    for column in (name for name in columns if name != CONTACTS):
        by_layer.setdefault(int(column.rpartition("_")[2]), []).append(column)
    kept: dict[str, Column] = {}
    with torch.inference_mode():
        for layer, hidden in network.forward(tokens, lengths, by_layer, maps):
            for column in by_layer[layer]:
                kind = column.rpartition("_")[0]
                if kind == "per_tok":
                    # One copy for the pack: what the network yields is overwritten.
                    whole = hidden.to("cpu", getattr(torch, per_tok_dtype), copy=True)
                    kept[column] = [one.numpy() for one in pooling.per_tok(whole, groups)]
                else:
                    pool = pooling.mean if kind == "mean" else pooling.bos
                    kept[column] = pool(hidden, groups).cpu().numpy()
                _refuse_non_finite(kept[column], sequences, column)
        if maps is not None:
            kept[CONTACTS] = [one.cpu().numpy() for one in maps.finish()]
            _refuse_non_finite(kept[CONTACTS], sequences, CONTACTS)
    return Vectors(kept)


def _refuse_non_finite(kept: Column, sequences: Sequence[FastaSequence], column: str) -> None:
    if not isinstance(kept, list) and np.isfinite(kept).all():
        return
    for sequence, vector in zip(sequences, kept, strict=True):
        if not np.isfinite(vector).all():
            owner = sequence.owners[0]
            kind, _, layer = column.rpartition("_")
            place = column if column == CONTACTS else f"{kind} of layer {layer}"
            raise NonFiniteError(f"record {owner.number} ({owner.id}): non-finite value in {place}")


def _needed(network: Network, sequences: Sequence[FastaSequence], columns: Sequence[str]) -> int:
    lengths = [len(sequence.residues) for sequence in sequences]
    tokens = sum(lengths) + 2 * len(lengths)
    kept_layers = sum(column.startswith("per_tok_") for column in columns)
    maps = contact_bytes(lengths) if CONTACTS in columns else 0
    return pack_bytes(tokens, network.shape.hidden_dim, kept_layers) + maps


def _is_out_of_memory(error: BaseException) -> bool:
    # torch reports failed CPU allocations as plain RuntimeErrors.
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _joined(first: Vectors, second: Vectors) -> Vectors:
    columns: dict[str, Column] = {}
    for name, one in first.columns.items():
        other = second.columns[name]
        if isinstance(one, list):
            columns[name] = [*one, *other]
        else:
            columns[name] = np.concatenate([one, other])
    return Vectors(columns)


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
