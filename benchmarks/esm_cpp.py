"""esm.cpp (`esm-cpp`), a contender with a Python of its own: it needs a numpy before 2.

`make benchmark` makes that Python from benchmarks/esm_cpp.txt and `Contender` starts this module
with it, so it imports nothing that is not there. What is timed is `forward_scheduled`, the
fastest way of the package; it gives logits alone. The vectors come from
`forward_with_hidden_states`, which takes one sequence at a time, and are not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.processes import answer

__all__ = ["ENVIRONMENT", "PYTHON", "command", "contender", "installed_version", "main"]

ENVIRONMENT = Path(__file__).parent.parent / ".venv-esm-cpp"
PYTHON = ENVIRONMENT / "bin" / "python"

Floats = npt.NDArray[np.float32]


def command(handle: int, weights: Path, dtype: str) -> list[str]:
    """Return the command that serves a connection with esm.cpp; the working folder is the project.

    handle: the connection's file descriptor; dtype: float32 or int8.
    """
    # -E: what PYTHONPATH names is installed for another numpy.
    return [str(PYTHON), "-E", "-m", "benchmarks.esm_cpp", str(handle), str(weights), dtype]


def installed_version() -> str:
    """Return the version of esm-cpp in its environment, or an empty text."""
    folders = [str(folder) for folder in ENVIRONMENT.glob("lib/python*/site-packages")]
    found = [one.version for one in distributions(name="esm-cpp", path=folders)]
    return found[0] if found else ""


def main(argv: Sequence[str]) -> None:
    """Serve the connection that `command` names."""
    handle, weights, dtype = argv
    answer(Connection(int(handle)), contender(Path(weights), dtype))


def contender(weights: Path, dtype: str) -> dict[str, Callable[[list[bytes]], Any]]:
    """Return what answers `embed` and `vectors`.

    weights: model.safetensors of a Hugging Face folder; dtype: float32, or int8 for weights and
    activations. `embed` gives (sequences, 33) float32, the mean logits over the residues, and
    `vectors` (sequences, hidden_dim), the mean at the last layer.
    """
    import esm_cpp

    model = esm_cpp.Model.load_from_safetensors(str(weights))
    if dtype == "int8":
        model.quantize_weights()
    encode = esm_cpp.Tokenizer().encode

    def tokens(sequence: bytes) -> npt.NDArray[np.int32]:
        return np.asarray(encode(sequence.decode(), truncate=False), np.int32)

    def embed(sequences: list[bytes]) -> Floats:
        return _pooled(model.forward_scheduled([tokens(one) for one in sequences]))

    def vectors(sequences: list[bytes]) -> Floats:
        passes = (model.forward_with_hidden_states(tokens(one)) for one in sequences)
        return _pooled([hidden[-1] for _logits, hidden in passes])

    return {"embed": embed, "vectors": vectors}


def _pooled(by_token: Sequence[Floats]) -> Floats:
    """Return the means over the residues; by_token: (residues + 2, width) for each sequence."""
    return np.stack([one[1:-1].mean(0) for one in by_token])


if __name__ == "__main__":
    main(sys.argv[1:])
