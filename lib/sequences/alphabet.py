"""The ESM-2 alphabet: a table from the letters of a sequence to token numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["CLS", "EOS", "LETTERS", "tokenise"]

# fair-esm 2.0.0, esm.data.Alphabet.from_architecture("ESM-1b"): four special tokens, then these.
LETTERS = b"LAGVSERTIDPKQNFYMHWCXBUZO.-"
CLS, EOS, UNKNOWN = 0, 2, 3
_TABLE = np.full(256, UNKNOWN, dtype=np.uint8)
_TABLE[np.frombuffer(LETTERS, dtype=np.uint8)] = np.arange(4, 4 + len(LETTERS))


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
