"""Memory: if this fails, one long protein ends a week-long run, or the system kills it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import threading
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.processes import peak_bytes
from lib.errors import MachineError
from lib.models.detection import detect
from lib.models.untrained import make_model
from lib.network import memory, vectors
from lib.network.device import choose_pack, packs_at_once
from lib.network.esm2 import Network, load_network
from lib.network.memory import available_bytes, contact_bytes, kept_bytes, pack_bytes, ran_out
from lib.network.pipeline import computed
from lib.sequences.plan import Pack
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence
from lib.settings import load_settings
from schema.parquet import VectorColumn
from tests.conftest import SOME_PROTEINS, Place, Script
from tests.processes import run_function
from tests.reference import assert_near, read_run, worst_residue_error


def print_peak(
    path: Path, precision: str, packs: range, residues: int, columns: list[VectorColumn]
) -> None:
    """Print the peak of packs beyond what the process had after tiny ones.

    packs: as many as it has steps, of as many sequences of `residues` as a step.
    """
    torch.set_num_threads(2)
    settings = load_settings(overrides={"model.esm_model": str(path)})
    found = detect(settings.model, contacts=VectorColumn("contacts") in columns)
    network = load_network(found, torch.device("cpu"), getattr(torch, precision))
    network.fused = None  # attention by torch takes more memory

    def peak(packs: range, residues: int) -> int:
        owner = [Owner(0, "a", "", residues, "")]
        sequences = [Sequence(b"M" * residues, owner) for _ in range(packs.step)]
        parts = [Pack(range(start, start + packs.step), sequences) for start in packs]
        list(computed(network, parts, columns, "float32"))
        return peak_bytes()

    before = peak(range(0, 2, 1), 10)
    print(peak(packs, residues) - before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return models of 2 layers by their width: the second layer sees what the first has left.

    Narrow ones: loading them takes less memory than a pack; otherwise the peak would be loading's.
    Arrays are as large with more tokens, and quicker to compute: what matrices take grows with the
    square of the width.
    """
    folder = tmp_path_factory.mktemp("wide")
    paths = {width: folder / f"esm2_{width}.pt" for width in (160, 320)}
    for width, path in paths.items():
        make_model(path, 2, width, min(20, width // 16))
    return paths


MEAN = [VectorColumn("mean", 2)]
PER_TOK = [VectorColumn("per_tok", 1), VectorColumn("per_tok", 2)]
CONTACTS = [VectorColumn("contacts")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("width", "packs", "count", "residues", "columns"),
    [
        (320, 1, 104, 254, MEAN),  # so many that its arrays go back to the system
        (320, 1, 4, 254, MEAN),  # so few that products take as much
        (160, 1, 24, 1022, MEAN),
        (160, 2, 96, 254, MEAN),  # at once
        (320, 2, 1, 3_500, MEAN),  # one after the other
        (160, 1, 208, 254, PER_TOK),
        (320, 1, 1, 2_000, CONTACTS),
    ],
)
def test_packs_take_no_more_than_estimated(
    models: dict[int, Path],
    precision: str,
    width: int,
    packs: int,
    count: int,
    residues: int,
    columns: list[VectorColumn],
) -> None:
    parts = range(0, packs * count, count)
    done = run_function(partial(print_peak, models[width], precision, parts, residues, columns))
    assert done.status == 0, done.err
    kept = sum(column.kind == "per_tok" for column in columns)
    tokens = count * (residues + 2)
    needed = pack_bytes(tokens, width) + kept_bytes(tokens, width, kept, torch.device("cpu"))
    needed += contact_bytes([residues] * count) if columns == CONTACTS else 0
    at_once = packs if residues + 2 <= 2048 else 1
    assert int(done.out) <= at_once * needed


def test_packs_of_default_size_take_at_most_a_gigabyte_at_the_largest_model() -> None:
    cpu = torch.device("cpu")
    tokens, _ = choose_pack(load_settings().compute, cpu)
    assert packs_at_once(cpu) * pack_bytes(tokens, 5120) <= 1e9


def test_vectors_that_are_kept_take_the_memory_of_the_cpu(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged to a GPU that computes them, packs would be halved for nothing."""
    found = detect(load_settings(overrides={"model.esm_model": str(small_model)}).model)
    network = load_network(found, torch.device("cpu"), torch.float32)
    pack = [Sequence(b"M" * 98, [Owner(0, "p", "", 98, "")])]
    here = vectors.needed_bytes(network, pack, PER_TOK) - vectors.needed_bytes(network, pack, MEAN)
    assert here == kept_bytes(100, 64, 2, network.device) == 3 * 2 * 4 * 100 * 64
    network.device = cuda = torch.device("cuda", 0)
    needed = [vectors.needed_bytes(network, pack, columns) for columns in (MEAN, PER_TOK)]
    assert needed[0] == needed[1]
    monkeypatch.setattr(
        vectors,
        "available_bytes",
        lambda device, _, **__: 1 << 60 if device == cuda else 200_000,
    )
    with pytest.raises(
        MachineError, match=r"98 residues need 204.8 kB of memory, 200.0 kB are available on cpu$"
    ):
        vectors.launch(network, pack, PER_TOK, "float32")


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tokens and the sequences of each pack that went through a network."""
    packs: list[tuple[int, int]] = []
    true_forward = Network.forward

    def forward(self: Network, tokens: torch.Tensor, lengths: list[int], *others: Any) -> object:  # noqa: ANN401
        packs.append((len(tokens), len(lengths)))
        return true_forward(self, tokens, lengths, *others)

    monkeypatch.setattr(Network, "forward", forward)
    return packs


def test_a_pack_that_does_not_fit_is_halved(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwarded: list[tuple[int, int]],
) -> None:
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    flags += ["--include", "mean", "bos", "per_tok"]
    assert script("embed", *flags).status == 0
    forwarded.clear()
    enough = pack_bytes(400, 64) + kept_bytes(400, 64, 1, torch.device("cpu"))
    monkeypatch.setattr(vectors, "available_bytes", lambda *_, **__: enough)
    assert script("embed", *flags).status == 0
    assert max(tokens for tokens, _ in forwarded) <= 400
    whole, halved = (read_run(place.output / f"run-00000{n}") for n in (1, 2))
    assert sorted(whole) == sorted(halved)
    for number, row in whole.items():
        for kind in ("mean_2", "bos_2", "per_tok_2"):
            one, other = row[kind], halved[number][kind]
            assert isinstance(one, np.ndarray)
            assert isinstance(other, np.ndarray)
            assert worst_residue_error(other[None], one[None]) <= 1e-5


def test_an_allocation_that_fails_halves_the_pack(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_forward = Network.forward

    def forward(self: Network, tokens: torch.Tensor, *others: Any) -> object:  # noqa: ANN401
        if len(tokens) > 400:
            torch.empty(1 << 60)
        return true_forward(self, tokens, *others)

    monkeypatch.setattr(Network, "forward", forward)
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    assert len(read_run(place.output / "run-000001")) == 15


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("could not create a memory object"), False),
    ],
    ids=str,
)
def test_only_a_lack_of_memory_is_called_one(error: Exception, lacks: bool) -> None:
    assert ran_out(error) is lacks


def test_before_a_protein_is_refused_code_may_leave_the_memory(
    script: Script,
    place: Place,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwarded: list[tuple[int, int]],
) -> None:
    """What the kernel frees last lets each protein in by itself, and no pack of several."""
    flags = ["--esm-model", small_model, "--input", SOME_PROTEINS]
    assert script("embed", *flags).status == 0
    forwarded.clear()

    def available(*_: object, at_most: bool) -> int:
        return 10**9 if at_most else 0

    monkeypatch.setattr(vectors, "available_bytes", available)
    assert script("embed", *flags).status == 0
    assert [sequences for _, sequences in forwarded] == [1] * 15
    assert_near(place.output / "run-000002", place.output / "run-000001")


def test_a_protein_that_does_not_fit_alone_is_named_with_what_it_needs(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = place.folder / "long.fasta"
    long.write_text(f">titin\n{'MKLV' * 1500}\n>short\nMKLV\n")
    flags = ["--esm-model", small_model, "--input", long]
    flags += ["--set", "input.long_sequences=whole"]
    monkeypatch.setattr(vectors, "available_bytes", lambda *_, **__: 10**7)
    answer = script("embed", *flags)
    assert answer.status == 4
    # As many rows as tokens, or filled up to 64 of them.
    assert re.fullmatch(
        r"record 0 \(titin\): 6000 residues need 41\.[89] MB of memory, "
        r"10\.0 MB are available on cpu",
        answer.error,
    )
    monkeypatch.undo()
    assert script("resume", "--run", "1", "--config", place.config).status == 0
    assert read_run(place.output / "run-000001")[0]["embedded_length"] == 6_000


def test_the_memory_left_on_this_machine_is_a_likely_number() -> None:
    left = available_bytes(torch.device("cpu"))
    assert left is not None
    assert 1e8 < left < 1e14


def print_what_is_given_back() -> None:
    """Free many small blocks below one that is kept; print what asking for more finds then."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [libc.malloc(60_000) for _ in range(3_000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    for block in blocks[:-1]:
        libc.free(ctypes.c_void_p(block))

    def left(**_: bool) -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return 10**10 - pages * os.sysconf("SC_PAGE_SIZE")

    with mock.patch.object(memory, "_left", left):
        before = available_bytes(torch.device("cpu")) or 0
        print((available_bytes(torch.device("cpu"), 10**11) or 0) - before)


def test_memory_that_was_freed_is_given_back_before_a_pack_is_refused() -> None:
    done = run_function(print_what_is_given_back)
    assert done.status == 0, done.err
    assert int(done.out) > 1.5e8


def print_what_arrow_gives_back() -> None:
    """Free many Arrow buffers; print how many bytes of memory leave the process then."""
    buffers = [pa.allocate_buffer(60_000) for _ in range(3_000)]
    for buffer in buffers:
        ctypes.memset(buffer.address, 1, buffer.size)
    del buffer, buffers

    def taken() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = taken()
    memory.give_back()
    print(before - taken())


def test_what_arrow_freed_is_given_back_too() -> None:
    done = run_function(print_what_arrow_gives_back)
    assert done.status == 0, done.err
    assert int(done.out) > 1e8


def test_what_was_freed_counts_as_available_to_packs_and_to_verification(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = threading.local()

    def left(**_: bool) -> int:
        """Nothing, but right after this thread has given memory back."""
        plenty, given.back = getattr(given, "back", False), False
        return 10**12 if plenty else 0

    monkeypatch.setattr(memory, "_left", left)
    monkeypatch.setattr(memory, "give_back", lambda: setattr(given, "back", True))
    answer = script("embed", "--esm-model", small_model, "--input", SOME_PROTEINS)
    assert answer.status == 0, answer.err
    answer = script("verify", "--run", "1", "--config", place.config)
    assert answer.status == 0, answer.err
    assert "available" not in answer.out + answer.err


def test_the_address_space_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -v`, as batch systems set it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 50_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    left = available_bytes(torch.device("cpu"))
    assert left is not None
    assert 0 <= left <= 50_000_000
