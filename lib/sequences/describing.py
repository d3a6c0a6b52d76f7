"""Describing columns: what a checkpoint file tells of its records, apart from their vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib.arrow import Values, arrow_array
from lib.sequences.windows import Sequence as FastaSequence
from schema.parquet import DESCRIBING

__all__ = ["describe_owners", "owner_index"]


def describe_owners(sequences: Sequence[FastaSequence]) -> pa.RecordBatch:
    """Return a row for every owner of every sequence, in their order, with every such column."""
    index = owner_index(sequences)
    owners = [owner for sequence in sequences for owner in sequence.owners]
    lengths = np.array([len(sequence.residues) for sequence in sequences], np.int32)
    digests = [hashlib.sha256(sequence.residues).digest() for sequence in sequences]
    columns: list[Values] = [
        [owner.number for owner in owners],
        [owner.id for owner in owners],
        [owner.description for owner in owners],
        [owner.length for owner in owners],
        lengths[index],
        [digests[i] for i in index.tolist()],
        [owner.md5 for owner in owners],
    ]
    arrays = [
        arrow_array(column, kind) for column, kind in zip(columns, DESCRIBING.types, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=DESCRIBING)


def owner_index(sequences: Sequence[FastaSequence]) -> npt.NDArray[np.int64]:
    """Return (owners,) the place in `sequences` of the one that each owner has."""
    return np.repeat(np.arange(len(sequences)), [len(one.owners) for one in sequences])
