"""The ESM-2 alphabet: a table from the letters of a sequence to token numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from schema.esm2_config import ALPHABET

__all__ = ["CLS", "EOS", "LETTERS", "tokenise"]

LETTERS = "".join(token for token in ALPHABET if len(token) == 1).encode()
CLS, EOS, UNKNOWN = map(ALPHABET.index, ("<cls>", "<eos>", "<unk>"))
_TABLE = np.full(256, UNKNOWN, dtype=np.uint8)
_TABLE[np.frombuffer(LETTERS, dtype=np.uint8)] = list(map(ALPHABET.index, LETTERS.decode()))


def tokenise(sequences: list[bytes]) -> npt.NDArray[np.uint8]:
    """Return the tokens of `sequences` end to end, each between <cls> and <eos>.

    Shape (sum of len + 2,). `lib.sequences.records` has checked the letters.
    """
    total = sum(map(len, sequences)) + 2 * len(sequences)
    tokens = np.empty(total, dtype=np.uint8)
    start = 0
    for sequence in sequences:
        stop = start + len(sequence) + 1
        tokens[start] = CLS
        tokens[start + 1 : stop] = _TABLE[np.frombuffer(sequence, dtype=np.uint8)]
        tokens[stop] = EOS
        start = stop + 1
    return tokens
