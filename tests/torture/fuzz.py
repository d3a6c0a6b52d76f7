"""Readers against mutated files, in children that may die of it.

A trial mutates a good file and reads it. The reader may return or refuse in one line; a
traceback, a signal, more than 10 seconds or more than 1 GB of memory beyond the start is a loss.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import resource
import signal
import struct
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from backports import zstd
from safetensors.torch import save, save_file

from lib.errors import LedgerError
from lib.ledger.footer import read_footer
from lib.models.detection import detect
from lib.models.formats import open_weights
from lib.models.regression import read_regression_file
from lib.models.untrained import make_model
from lib.sequences.inputs import input_sources
from lib.sequences.inventory import preflight
from lib.sequences.records import read_file
from lib.settings import DEFAULT_CONFIG, load_settings
from schema.parquet import FOOTER_KEY
from tests.conftest import UNIPROT_PART
from tests.torture.outcome import Outcome

_HANG_SECONDS = 10
_MEMORY = 1 << 30
_TRIALS_PER_CHILD = 100
_TRIALS_PER_ROUND = 80
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstd.compress(
        content, options={zstd.CompressionParameter.checksum_flag: 1}
    ),
}


@dataclass(frozen=True)
class _Target:
    """A reader and how a file for it is made; `write` puts the mutated file at a path."""

    what: str
    suffix: str
    write: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]


def trials(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Fuzz every reader with 80 files a round; files are left in `folder` if lost."""
    return [_fuzz(target, folder, _TRIALS_PER_ROUND * rounds, seed) for target in _targets(folder)]


# ---- Running


def _fuzz(target: _Target, folder: Path, trials: int, seed: int) -> Outcome:
    count, refused = 0, 0
    losses: list[str] = []
    while count < trials:
        path = folder / f"trial{target.suffix}"
        numbers = range(count, min(count + _TRIALS_PER_CHILD, trials))
        done, fault = _in_child(target, path, numbers, seed)
        count += done["tried"]
        refused += done["refused"]
        if fault:
            kept = folder / f"lost-{len(losses)}-{target.what.replace(' ', '-')}{target.suffix}"
            if path.is_file():
                path.rename(kept)
            losses.append(f"{fault} (seed {seed}, trial {count - 1})")
    happened = f"{count - refused - len(losses)} read, {refused} refused in one line"
    return Outcome(f"fuzz: {target.what}", count, happened, "; ".join(losses[:3]) or "nothing")


def _in_child(target: _Target, path: Path, numbers: range, seed: int) -> tuple[dict[str, int], str]:
    """Try files in a forked child up to the first fault; return its counts and the fault."""
    report = path.with_suffix(".json")
    report.write_text(json.dumps({"tried": 0, "refused": 0, "fault": ""}))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _try_many(target, path, report, numbers, seed)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    told = json.loads(report.read_text())
    fault = told.pop("fault")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        fault = "hang" if number == signal.SIGALRM else f"signal {signal.Signals(number).name}"
    return told, fault


def _try_many(target: _Target, path: Path, report: Path, numbers: range, seed: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
    told: dict[str, Any] = {"tried": 0, "refused": 0, "fault": ""}
    for number in numbers:
        draw = random.Random(f"{seed} {target.what} {number}")
        target.write(path, draw)
        told["tried"] = number - numbers.start + 1
        report.write_text(json.dumps(told))  # if the reader kills this process
        signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS)
        try:
            target.read(path)
        except (LedgerError, _RefusedError) as error:
            told["refused"] += 1
            if len(str(error).splitlines()) != 1:
                told["fault"] = f"an error of several lines: {str(error)!r}"
        except BaseException as error:
            told["fault"] = " ".join(traceback.format_exception_only(error)[-1].split())
        signal.alarm(0)
        report.write_text(json.dumps(told))
        if told["fault"]:
            break


class _RefusedError(Exception):
    """read_footer refuses with a ValueError, which a stray one must not pass for."""


# ---- Mutations


def _mutated(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite, one to four times."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place, size = draw.randrange(len(changed) + 1), draw.choice([1, 1, 2, 4, 8, 64])
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + size] = draw.randbytes(size)
        elif kind == 2:
            del changed[place : place + size]
        elif kind == 3:
            changed[place:place] = changed[place : place + size] * draw.choice([1, 2, 100])
        elif kind == 4:
            odd = [
                b"\xff" * 8,
                b"\0" * 8,
                b"\x7f" + b"\xff" * 7,
                b"\r",
                b"\n>",
                b"9" * 11,
                b"9" * 400,
            ]
            changed[place : place + size] = draw.choice(odd)
        elif draw.random() < 0.2:
            del changed[place:]
    return bytes(changed)


def _targets(folder: Path) -> list[_Target]:
    model = folder / "tiny.pt"
    regression = make_model(model, 1, 16, 2)
    fasta = UNIPROT_PART.read_bytes()
    ini = DEFAULT_CONFIG.read_bytes()
    targets = [
        _Target(f"FASTA, {kind}", f".{kind}", _writer(compress(fasta)), _read_fasta)
        for kind, compress in _COMPRESS.items()
    ]
    return [
        *targets,
        _Target("compressed FASTA, gains or loses", ".fasta", _several_streams, _read_streams),
        _Target(".pt, bytes", ".pt", _writer(model.read_bytes()), _detect),
        _Target(".pt, pickle", ".pt", _pickle_writer(model), _detect),
        _Target("contact regression", ".pt", _pickle_writer(regression), _regression),
        _Target("config.json", "", _folder_writer(model, folder, "config.json"), _detect),
        _Target("safetensors", "", _folder_writer(model, folder, "model.safetensors"), _detect),
        _Target(
            "adapter_config.json",
            "-adapter",
            _adapter_writer(model, "adapter_config.json"),
            _detect,
        ),
        _Target("adapter safetensors", "-adapter", _adapter_writer(model, "adapter"), _detect),
        _Target("checkpoint footer", ".parquet", _writer(_parquet(folder)), _footer),
        _Target("config.ini", ".ini", _writer(ini), lambda path: load_settings(path)),
    ]


def _writer(content: bytes) -> Callable[[Path, random.Random], None]:
    def write(path: Path, draw: random.Random) -> None:
        path.write_bytes(_mutated(content, draw))

    return write


def _several_streams(path: Path, draw: random.Random) -> None:
    """Write two compressed streams, with one byte changed or the end cut off."""
    compress = _COMPRESS[draw.choice(["gz", "bz2", "xz", "zst"])]
    first = compress(_STREAMS[0])
    content = bytearray(first + compress(_STREAMS[1]))
    if draw.random() < 0.5:
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    else:
        cut = draw.randrange(1, len(content))
        del content[cut + (cut == len(first)) :]  # a cut between streams leaves a good file
    path.write_bytes(content)


_STREAMS = (b">a one\nMKTAYIAKQR\n>b\nGG\n", b">c\nGGG\n>d\nMKV\n")
_WHOLE = [("a", b"MKTAYIAKQR"), ("b", b"GG"), ("c", b"GGG"), ("d", b"MKV")]


def _pickle_writer(model: Path) -> Callable[[Path, random.Random], None]:
    with zipfile.ZipFile(model) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def write(path: Path, draw: random.Random) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                mutated = name.endswith("data.pkl")
                archive.writestr(name, _mutated(content, draw) if mutated else content)

    return write


def _folder_writer(model: Path, folder: Path, part: str) -> Callable[[Path, random.Random], None]:
    """Write a Hugging Face folder of which one file is mutated; of tensors, only the header."""
    weights = open_weights(model)
    tensors = {name: tensor.clone() for name, tensor in weights.read(weights.tensors)}
    save_file(tensors, folder / "good.safetensors")
    good = (folder / "good.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", good[:8])
    config = {
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "token_dropout": True,
        "mask_token_id": 32,
        "layer_norm_eps": 1e-5,
    }
    said = json.dumps(config).encode()

    def write(path: Path, draw: random.Random) -> None:
        path.mkdir(exist_ok=True)
        header = _mutated(good[8 : 8 + size], draw)
        claimed = len(header) if draw.random() < 0.9 else draw.randrange(2**64)
        changed = struct.pack("<Q", claimed) + header + good[8 + size :]
        is_config = part == "config.json"
        (path / "config.json").write_bytes(_mutated(said, draw) if is_config else said)
        (path / "model.safetensors").write_bytes(good if is_config else changed)

    return write


def _adapter_writer(model: Path, part: str) -> Callable[[Path, random.Random], None]:
    """Write a LoRA adapter of the model, of which one file is mutated."""
    stem = "base_model.model.esm.encoder.layer.0.attention.self.query.lora_"
    tensors = {f"{stem}A.weight": torch.ones(2, 16), f"{stem}B.weight": torch.ones(16, 2)}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(model),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "alpha_pattern": {"key": 1},
        "init_lora_weights": True,
        "modules_to_save": [],
    }
    said, good = json.dumps(config).encode(), save(tensors)

    def write(path: Path, draw: random.Random) -> None:
        path.mkdir(exist_ok=True)
        is_config = part == "adapter_config.json"
        (path / "adapter_config.json").write_bytes(_mutated(said, draw) if is_config else said)
        (path / "adapter_model.safetensors").write_bytes(
            good if is_config else _mutated(good, draw)
        )

    return write


def _parquet(folder: Path) -> bytes:
    path = folder / "good.parquet"
    table = pa.table({"record": [0, 1], "id": ["a", "b"]})
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: b'{"writer": "1"}'}), path)
    return path.read_bytes()


# ---- Readers


def _read_fasta(path: Path) -> None:
    rules = load_settings(overrides={"input.fasta": str(path), "input.duplicate_ids": "keep"})
    preflight(rules.input)


def _read_streams(path: Path) -> None:
    rules = load_settings(overrides={"input.fasta": str(path)}).input
    (source,) = input_sources(rules)
    batches = read_file(source, rules, 0, several=False)
    found = [(record.id, record.residues) for batch in batches for record in batch]
    if found != _WHOLE:
        raise AssertionError(f"records {found} of a damaged file")


def _detect(path: Path) -> None:
    detect(load_settings(overrides={"model.esm_model": str(path)}).model)


def _regression(path: Path) -> None:
    read_regression_file(path, 1, 2)


def _footer(path: Path) -> None:
    try:
        read_footer(path)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise _RefusedError(str(error)) from None
