"""What is embedded in a benchmark: random sequences of the length mixes that people have."""

from __future__ import annotations

import numpy as np

__all__ = ["MIXES", "sequences", "useful_flops"]

_RESIDUES = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
MIXES = {
    "orf": "uniform, 50 to 166 residues: translated reading frames of short reads",
    "proteome": "log-normal around 330 residues, 30 to 1,022: a bacterial proteome",
    "uniref": "log-normal around 250 residues, 11 to 1,022: UniRef50",
}


def sequences(mix: str, count: int, seed: int = 0) -> list[bytes]:
    """Return `count` random sequences with the lengths of a mix."""
    chance = np.random.default_rng(seed)
    if mix == "orf":
        lengths = chance.integers(50, 167, count)
    else:
        median, spread, least = (330, 0.6, 30) if mix == "proteome" else (250, 0.75, 11)
        drawn = np.exp(chance.normal(np.log(median), spread, count))
        lengths = np.clip(drawn, least, 1022).astype(np.int64)
    return [chance.choice(_RESIDUES, length).tobytes() for length in lengths]


def useful_flops(lengths: list[int], num_layers: int, hidden_dim: int) -> float:
    """Return the floating-point operations that embedding needs.

    24 L d^2 + 4 L d s per token: the matrices of a layer, and scores and values of attention
    for a sequence of s tokens (two operations per multiply-add).
    """
    per_token = [
        24 * num_layers * hidden_dim**2 + 4 * num_layers * hidden_dim * (length + 2)
        for length in lengths
    ]
    return float(sum(p * (length + 2) for p, length in zip(per_token, lengths, strict=True)))
