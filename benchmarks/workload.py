"""What is embedded in a benchmark: random sequences of the length mixes that people have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib.catalog import RELEASED
from schema.esm2_config import ModelShape

__all__ = ["MIXES", "Case", "sequences", "useful_flops"]

_SIZES = {name.split("_")[2]: name for name in RELEASED}
_RESIDUES = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)
MIXES = {
    "orf": "uniform, 50 to 166 residues: translated reading frames of short reads",
    "proteome": "log-normal around 330 residues, 30 to 1,022: a bacterial proteome",
    "uniref": "log-normal around 250 residues, 11 to 1,022: UniRef50",
}


@dataclass(frozen=True)
class Case:
    """What is measured: so many sequences of a mix, through a model of a released size."""

    size: str
    mix: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Return the case of SIZE:MIX:SEQUENCES; raises ValueError, in one line."""
        size, _, rest = text.partition(":")
        mix, _, count = rest.partition(":")
        if size not in _SIZES:
            raise ValueError(f"{text}: size is none of {', '.join(_SIZES)}")
        if mix not in MIXES:
            raise ValueError(f"{text}: mix is none of {', '.join(MIXES)}")
        if not count.isdecimal() or int(count) == 0:
            raise ValueError(f"{text}: sequences is not a whole number from 1")
        return cls(size, mix, int(count))

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return RELEASED[_SIZES[self.size]].shape

    def __str__(self) -> str:
        return f"{self.size}:{self.mix}:{self.count}"


def sequences(mix: str, count: int) -> list[bytes]:
    """Return `count` random sequences with the lengths of a mix, the same at every call."""
    chance = np.random.default_rng(0)
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
