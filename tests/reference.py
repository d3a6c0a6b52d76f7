"""The numerical truth: fair-esm in float32 on the same weights, one sequence at a time."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import esm
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

Array = npt.NDArray[np.float32]


class Reference:
    """fair-esm's own model, loaded by fair-esm's own loader."""

    def __init__(self, path: Path) -> None:
        with torch.serialization.safe_globals([argparse.Namespace]), _filled_from_the_file():
            model, self._alphabet = esm.pretrained.load_model_and_alphabet_local(str(path))
        self._model = model.eval().float()
        self.num_layers: int = self._model.num_layers

    def tokens(self, residues: str, layers: Iterable[int]) -> dict[int, Array]:
        """Return (residues + 2, hidden_dim) by layer, <cls> and <eos> included."""
        return self.tokens_and_contacts(residues, layers, contacts=False)[0]

    def contacts(self, residues: str) -> Array:
        """Return the (residues, residues) probabilities."""
        return self.tokens_and_contacts(residues, [])[1]

    def tokens_and_contacts(
        self, residues: str, layers: Iterable[int], *, contacts: bool = True
    ) -> tuple[dict[int, Array], Array]:
        """Return both of one pass; the contacts are empty unless they are wanted."""
        _, _, tokens = self._alphabet.get_batch_converter()([("", residues)])
        with torch.inference_mode():
            found = self._model(tokens, repr_layers=list(layers), return_contacts=contacts)
        hidden = {layer: value[0].numpy() for layer, value in found["representations"].items()}
        return hidden, found["contacts"][0].numpy() if contacts else np.empty((0, 0), np.float32)


@contextmanager
def _filled_from_the_file() -> Iterator[None]:
    """Begin modules with NaN, as random numbers take long: what no file fills would be seen."""

    def fill(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        with torch.no_grad():
            return tensor.fill_(math.nan)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "normal_"):
            patch.setattr(torch.nn.init, name, fill)
        yield


def worst_residue_error(found: Array, truth: Array) -> float:
    """Return the largest relative L2 error of any row; both are (rows, hidden_dim)."""
    assert found.shape == truth.shape
    error = np.linalg.norm(found.astype(np.float64) - truth, axis=-1)
    return float((error / np.linalg.norm(truth.astype(np.float64), axis=-1)).max())


def fasta(path: Path) -> list[tuple[str, str]]:
    """Read (header, sequence) by the plainest code there is."""
    entries: list[tuple[str, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith(">"):
            entries.append((line[1:], ""))
        else:
            entries[-1] = (entries[-1][0], entries[-1][1] + line.strip())
    return entries


def read_run(folder: Path) -> dict[int, dict[str, bytes | str | int | Array]]:
    """Read a run's folder as its users do, by record; vectors as arrays."""
    rows: dict[int, dict[str, bytes | str | int | Array]] = {}
    table = pq.read_table(folder)
    columns = [_cells(column) for column in table.columns]
    for cells in zip(*columns, strict=True):
        row = dict(zip(table.column_names, cells, strict=True))
        assert row["record"] not in rows, f"record {row['record']} stands twice"
        rows[row["record"]] = row
    return rows


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """Return a column's values: a list as an array of float32, as Python's numbers take long."""
    if pa.types.is_nested(column.type):
        lists = [one.values for one in column]
        return [None if one is None else np.array(one, dtype=np.float32) for one in lists]
    return list(column.to_pylist())


def assert_same_bits(found: Path, expected: Path) -> None:
    """Compare two runs' folders: every record once, every column the same to the bit."""
    one, other = read_run(found), read_run(expected)
    assert sorted(one) == sorted(other)
    for record, row in one.items():
        assert row.keys() == other[record].keys()
        for name, value in row.items():
            expected_value = other[record][name]
            if isinstance(value, np.ndarray):
                assert isinstance(expected_value, np.ndarray)
                assert value.tobytes() == expected_value.tobytes(), (record, name)
            else:
                assert value == expected_value, (record, name)


def assert_near(found: Path, expected: Path, *, same_bits_for: Iterable[int] = ()) -> None:
    """Compare two runs: every record once, in all but vectors alike, and vectors near enough."""
    one, other = read_run(found), read_run(expected)
    assert sorted(one) == sorted(other)
    same = {*same_bits_for}
    for record, row in one.items():
        for name, value in row.items():
            truth = other[record][name]
            if not isinstance(value, np.ndarray):
                assert value == truth, (record, name)
                continue
            assert isinstance(truth, np.ndarray)
            if record in same:
                assert value.tobytes() == truth.tobytes(), (record, name)
            elif name == "contacts":
                assert np.abs(value - truth).max() <= 1e-5
            else:
                assert worst_residue_error(value.reshape(-1, 64), truth.reshape(-1, 64)) <= 1e-5


def write_fasta(path: Path, entries: Sequence[tuple[str, str]]) -> Path:
    """Write (header, sequence) entries."""
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in entries))
    return path
