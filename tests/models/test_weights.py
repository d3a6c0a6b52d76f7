"""Weights on disk: fair-esm files, Hugging Face folders, and whatever pretends to be one.

If these fail, a downloaded file can run code on a user's machine, or broken and foreign weights
become vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import esm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.processes import peak_bytes
from lib.errors import WeightsError
from lib.jobs.loading import load_model
from lib.models.detection import Detection, detect
from lib.models.formats import open_weights
from lib.models.untrained import make_model
from lib.sequences.alphabet import tokenise
from lib.settings import load_settings
from schema.esm2_config import ModelShape
from tests.conftest import Place, Script
from tests.processes import run_function
from tests.torture import strace

TRUNK = "encoder.sentence_encoder."
SEQUENCE = b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"

State = dict[str, torch.Tensor]


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        archive: dict[str, Any] = torch.load(path, weights_only=True)
    return archive


def found(path: Path) -> Detection:
    return detect(load_settings(overrides={"model.esm_model": str(path)}).model)


def hidden(path: Path) -> list[torch.Tensor]:
    """Every layer of a short sequence, (tokens, hidden_dim) each."""
    said = load_settings(overrides={"model.esm_model": str(path), "compute.device": "cpu"})
    detection = detect(said.model)
    network = load_model(said, detection, "0" * 64).network
    tokens = torch.from_numpy(tokenise([SEQUENCE]))
    layers = range(detection.shape.num_layers + 1)
    return [x.clone() for _, x in network.forward(tokens, [len(SEQUENCE)], layers)]


def refusal(path: Path) -> str:
    """The one line with which a path is refused as weights, without the path."""
    with pytest.raises(WeightsError) as caught:
        found(path)
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert told.startswith(f"{path}: ")
    return told.removeprefix(f"{path}: ")


# ---- Hostile files


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Restored:
    """Acts when its state is restored."""

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).touch()


class Module(torch.nn.Module):
    """A whole network, pickled with its code's address."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def restored(marker: str) -> Restored:
    made = Restored()
    made.__dict__["marker"] = marker
    return made


# What is called, and the name that pickle gives it (protocol 2 writes those of Python 2).
HOSTILE: dict[str, tuple[Callable[[str], object], str]] = {
    "os.system": (lambda marker: Call(os.system, f"touch {marker}"), "posix.system"),
    "eval": (lambda marker: Call(eval, f"open({marker!r}, 'w')"), "eval"),
    "exec": (lambda marker: Call(exec, f"open({marker!r}, 'w')"), "exec"),
    "open": (lambda marker: Call(open, marker, "w"), f"{open.__module__}.open"),  # io or _io
    "subprocess": (lambda marker: Call(subprocess.run, ["touch", marker]), "commands.run"),
    "Path.touch": (lambda marker: Call(Path.touch, Path(marker)), "getattr"),
    "setstate": (restored, "tests.models.test_weights.Restored"),
    "module": (Module, "tests.models.test_weights.Module"),
}


@pytest.mark.parametrize("key", ["cfg", "model", "whole"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile_pickles_are_refused_and_nothing_runs(
    script: Script, tmp_path: Path, small_model: Path, kind: str, key: str
) -> None:
    make, named = HOSTILE[kind]
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    payload = make(str(marker))
    torch.save(payload if key == "whole" else {**load(small_model), key: payload}, path)
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    fact = f"its pickle asks for {named}, which is not in the allow-list"
    assert answer.error == f"{path}: refused: {fact}"
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()


def rewritten(source: Path, target: Path, **members: bytes) -> Path:
    """A copy of an archive with other bytes in some of its members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = members.get(Path(name).stem if name.endswith(".pkl") else "", old.read(name))
            new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"\x80\x02c__builtin__\neval\nX\x16\x00\x00\x00open('MARKER', mode='w')\x85R.",
        b"cargparse\nNamespace\n)R}X\x01\x00\x00\x00acos\nsystem\nsb.",
        b"cargparse\nFileType\n(S'w'\ntR(S'MARKER'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    ],
)
def test_pickles_written_by_hand_are_refused_and_nothing_runs(
    script: Script,
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    pickled: bytes,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = rewritten(small_model, tmp_path / "hostile.pt", data=pickled)
    answer = script("detect", "--esm-model", path)
    assert answer.status == 2
    assert answer.error.startswith(f"{path}: ")
    assert not (tmp_path / "MARKER").exists()


LITTLE_MEMORY = 100_000_000


def print_refusals(paths: Sequence[Path]) -> None:
    """Print of each path the line that refuses it as weights, and how far the peak grew."""
    for path in paths:
        model = load_settings(overrides={"model.esm_model": str(path)}).model
        before = peak_bytes()
        try:
            detect(model)
        except WeightsError as error:
            line = str(error).removeprefix(f"{path}: ")
            print(line, peak_bytes() - before, sep="\n")
    before = peak_bytes()
    taken = b"1" * (2 * LITTLE_MEMORY)
    print(peak_bytes() - before)
    del taken


def refused_apart(*paths: Path) -> list[str]:
    """The lines with which paths are refused, each in little memory, by a process of their own."""
    done = run_function(partial(print_refusals, paths))
    assert done.status == 0, done.err
    *said, seen = done.out.splitlines()
    assert int(seen) > LITTLE_MEMORY  # what is taken shows
    assert all(int(taken) < LITTLE_MEMORY for taken in said[1::2]), said
    assert len(said) == 2 * len(paths)
    return said[::2]


def reduced(name: str, *arguments: bytes) -> bytes:
    """The pickle of a call, by opcodes."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


HUGE = b"J\xff\xff\xff\x7f"
ENCODE_AGAIN = b"h\x00h\x01" + text("hex") + b"\x86Rq\x01"
OF_ONE = HUGE + b"\x85K\x01\x85"  # shape and strides of a long vector


def storage(elements: bytes, kind: str = "torch FloatStorage", key: str = "0") -> bytes:
    name = b"c" + kind.replace(" ", "\n").encode() + b"\n"
    return b"(" + text("storage") + name + text(key) + text("cpu") + elements + b"tQ"


def tensor(storage: bytes, shape: bytes) -> bytes:
    ordered = b"ccollections\nOrderedDict\n)R"
    return reduced("torch._utils _rebuild_tensor_v2", storage, b"K\x00", shape, b"\x89", ordered)


# What asks for memory, and the fact with which it is refused.
ASKING = {
    "bytearray": (reduced("builtins bytearray", HUGE), "bytearray"),
    "bytearray of Python 2": (reduced("__builtin__ bytearray", HUGE), "bytearray"),
    "Tensor": (reduced("torch Tensor", HUGE), "torch.Tensor"),
    "FloatTensor": (reduced("torch FloatTensor", HUGE), "torch.FloatTensor"),
    "storage": (reduced("torch.storage UntypedStorage", HUGE), "torch.storage.UntypedStorage"),
    "counter": (reduced("collections Counter", text("aaaa")), "collections.Counter"),
    "encoding": (
        b"c_codecs\nencode\nq\x00"
        + text("a" * 64)
        + text("latin1")
        + b"\x86Rq\x01"
        + ENCODE_AGAIN * 24,
        "_codecs.encode",
    ),
    "type": (
        reduced("torch._tensor _rebuild_from_type_v2", b"ctorch\nFloatTensor\n", b"N", b"N", b"N"),
        "torch._tensor._rebuild_from_type_v2",
    ),
}
# Of small_model, storage 0 is the embedding: 33 x 64 numbers of 4 bytes.
BEYOND = {
    "a storage": (
        tensor(storage(HUGE), OF_ONE),
        "asks for a storage '0' of 2147483647 x 4 bytes, the archive has 8448",
    ),
    "a storage that is not there": (
        tensor(storage(b"K\x01", key="no"), OF_ONE),
        "asks for a storage 'no' of 1 x 4 bytes, the archive has 0",
    ),
    "a tensor": (
        tensor(storage(b"K\x04"), OF_ONE),
        "has a tensor of shape (2147483647,) in a storage of 16 bytes",
    ),
    "the state of a tensor": (
        tensor(storage(b"K\x04"), b"K\x04\x85K\x01\x85") + b"(" + storage(b"K\x04") + b"tb",
        "restores the state of torch._utils._rebuild_tensor_v2",
    ),
    "copies of a set": (
        b"]q\x00(" + b"K\x01" * 1000 + b"e" + (b"cbuiltins\nset\nh\x00\x85R" * 200),
        "copies more than its ",
    ),
    "a set of a wide tensor": (
        reduced("builtins set", tensor(storage(b"K\x04"), HUGE + b"\x85K\x00\x85")),
        "copies more than its ",
    ),
}


def asking(source: Path, folder: Path, pickles: Mapping[str, bytes]) -> list[Path]:
    return [
        rewritten(source, folder / f"{name}.pt", data=b"\x80\x02" + pickled + b".")
        for name, pickled in pickles.items()
    ]


def test_pickles_that_ask_for_memory_are_refused_before_they_get_it(
    tmp_path: Path, small_model: Path
) -> None:
    """Before, only bytearray and Tensor were refused for it; 'encoding' took 2 GB."""
    paths = asking(small_model, tmp_path, {key: pickled for key, (pickled, _) in ASKING.items()})
    assert refused_apart(*paths) == [
        f"refused: its pickle asks for {name}, which is not in the allow-list"
        for _, name in ASKING.values()
    ]


def test_pickles_that_go_beyond_their_archive_are_refused_before_they_get_memory(
    tmp_path: Path, small_model: Path
) -> None:
    paths = asking(small_model, tmp_path, {key: pickled for key, (pickled, _) in BEYOND.items()})
    for told, (_, fact) in zip(refused_apart(*paths), BEYOND.values(), strict=True):
        assert told.startswith(f"refused: its pickle {fact}")


def test_what_a_configuration_may_hold_is_read(tmp_path: Path, small_model: Path) -> None:
    """Sets, bytes, parameters and shapes: the pickle asks for nothing but what is in it."""
    archive = load(small_model)
    archive["cfg"]["model"].extras = [
        {"a", "b"}, b"\x00\xff bytes", torch.Size([2, 3]), torch.device("cpu"), torch.float16,
        1.5, 2**70, None, (1, 2, 3, 4),
    ]  # fmt: skip
    archive["model"] = {
        name: torch.nn.Parameter(value) if value.is_floating_point() else value
        for name, value in archive["model"].items()
    }
    torch.save(archive, tmp_path / "m.pt")
    assert found(tmp_path / "m.pt").shape == found(small_model).shape


def test_compressed_archives_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("esm2/data.pkl", b"0" * (2 * LITTLE_MEMORY))
    assert refused_apart(path) == ["member esm2/data.pkl is compressed"]


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("../outside", False),
        ("/outside", False),
        ("nested.pt", False),
        ("archive/../../outside", True),
        ("archive/nested.pt", True),
    ],
)
def test_members_of_an_archive_are_never_extracted(
    tmp_path: Path, small_model: Path, name: str, is_read: bool
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = rewritten(small_model, folder / "m.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, small_model.read_bytes())
    if is_read:
        assert found(path).shape.num_layers == 2
    else:
        assert "file in archive is not in a subdirectory" in refusal(path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "b", "m.pt"]


# os.open and open end in the same event: (path, mode, flags).
OPENED: list[tuple[object, int]] | None = None


def record_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append((arguments[0], arguments[2] or 0))


@pytest.mark.parametrize("kind", ["fair-esm", "huggingface"])
def test_weights_are_opened_read_only(
    request: pytest.FixtureRequest, small_model: Path, kind: str
) -> None:
    global OPENED
    path = small_model if kind == "fair-esm" else request.getfixturevalue("folder")
    sys.addaudithook(record_opens)
    OPENED = []
    try:
        hidden(path)
        open_weights(path).sha256()
        opened = [(str(name), flags) for name, flags in OPENED]
    finally:
        OPENED = None
    ours = [(name, flags) for name, flags in opened if name.startswith(str(path))]
    assert ours
    written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    assert [name for name, flags in ours if flags & written] == []


@pytest.mark.skipif(not strace.is_there(), reason="strace is not there, or may not trace")
@pytest.mark.parametrize("kind", ["fair-esm", "huggingface"])
def test_the_kernel_is_asked_to_open_weights_read_only(
    request: pytest.FixtureRequest, place: Place, small_model: Path, kind: str
) -> None:
    # What torch's and safetensors' own code opens, no audit hook of Python sees.
    path = small_model if kind == "fair-esm" else request.getfixturevalue("folder")
    files = [path, *path.glob("*")]
    flags = ["--config", place.config, "--esm-model", path]
    changing = "?open,openat,?rename,?renameat,?renameat2,?unlink,unlinkat,ftruncate,?truncate"
    listed = f"{changing},write,pwrite64"
    done = strace.run("validate", flags, listed, files, place.folder / "calls")
    assert done.status == 0, done.err
    lines = [line for line in (place.folder / "calls").read_text().splitlines() if "(" in line]
    opened = [line for line in lines if re.search(r" open(at)?\(", line)]
    assert len({file for file in files if any(f'"{file}"' in line for line in opened)}) >= len(
        [file for file in files if file.is_file()]
    )
    assert all("O_RDONLY" in line and "O_CREAT" not in line for line in opened)
    assert [line for line in lines if line not in opened and "SIG" not in line] == []


@pytest.mark.parametrize("kind", ["fair-esm", "huggingface"])
def test_weights_stay_as_they_are(
    request: pytest.FixtureRequest, small_model: Path, kind: str
) -> None:
    path = small_model if kind == "fair-esm" else request.getfixturevalue("folder")
    before = {file: file.read_bytes() for file in [path, *path.glob("*")] if file.is_file()}
    stamps = {file: file.stat().st_mtime_ns for file in before}
    hidden(path)
    assert {file: file.read_bytes() for file in before} == before
    assert {file: file.stat().st_mtime_ns for file in before} == stamps


def test_a_rewritten_archive_is_still_read(tmp_path: Path, small_model: Path) -> None:
    assert found(rewritten(small_model, tmp_path / "copy.pt")).properties


def test_refusals_carry_no_advice_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save(Call(os.system, "true"), path)
    assert not re.search("weights_only|Please|trusted|torch.load", refusal(path))


# ---- Broken files


@pytest.mark.parametrize("kept", [0, 1, 4, 64, 1000, 0.5, 0.99, -22, -1])
def test_truncated_files_are_refused(
    script: Script, tmp_path: Path, small_model: Path, kept: float
) -> None:
    whole = small_model.read_bytes()
    size = int(len(whole) * kept) if isinstance(kept, float) else kept
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[:size])
    answer = script("detect", "--esm-model", path)
    fact = "truncated, or not a torch.save archive (no zip directory)"
    assert (answer.status, answer.error) == (2, f"{path}: {fact}")


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\n")
    assert refusal(path) == "truncated, or not a torch.save archive (no zip directory)"


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    assert refusal(path).startswith("refused: ")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_before_torch_1_6_is_refused_as_one(
    tmp_path: Path, small_model: Path, protocol: int
) -> None:
    """Before, it was called truncated."""
    path = tmp_path / "legacy.pt"
    torch.save(
        load(small_model), path, pickle_protocol=protocol, _use_new_zipfile_serialization=False
    )
    assert refusal(path) == "torch.save's format of before torch 1.6, not a zip archive"


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    assert refusal(tmp_path / "weights.pt") == "neither a file nor a folder"


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ([1, 2], "holds a list, not a dictionary"),
        (torch.ones(3), "holds a Tensor, not a dictionary"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"model": {"a": 1, 2: torch.ones(1)}}, "holds no tensors"),
        ({"model": [1]}, "its 'model' is a list, not a state dict"),
        ({"model": torch.ones(3)}, "its 'model' is a Tensor, not a state dict"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: object, fact: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert refusal(tmp_path / "other.pt") == fact


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scratch") / "tiny.pt"
    make_model(path, 1, 16, 2)
    return path


@settings(deadline=None)
@given(data=st.data())
def test_any_damage_is_survived_or_refused_in_one_line(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(scratch.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = scratch.with_name("damaged.pt")
    damaged.write_bytes(content)
    try:
        found(damaged)
    except WeightsError as error:
        assert len(str(error).splitlines()) == 1


@settings(deadline=None)
@given(data=st.data())
def test_any_damage_to_the_pickle_is_survived_or_refused_in_one_line(
    scratch: Path, data: st.DataObject
) -> None:
    with zipfile.ZipFile(scratch) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = bytearray(archive.read(name))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = rewritten(scratch, scratch.with_name("damaged.pt"), data=bytes(content))
    try:
        found(damaged)
    except WeightsError as error:
        assert len(str(error).splitlines()) == 1


# ---- Tensors that are not what they claim


def save_changed(source: Path, target: Path, changes: Mapping[str, torch.Tensor]) -> Path:
    archive = load(source)
    archive["model"] |= {TRUNK + name: tensor for name, tensor in changes.items()}
    torch.save(archive, target)
    return target


NOT_WHOLE = "tensor embed_tokens.weight is not stored whole (strided or sparse)"


def test_expanded_tensors_are_refused(tmp_path: Path) -> None:
    huge = {TRUNK + name: torch.ones(1).expand(shape) for name, shape in shapes(40, 8192)}
    torch.save({"model": huge}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    assert refused_apart(tmp_path / "bomb.pt") == [NOT_WHOLE]


def test_counts_and_shapes_beyond_reason_are_refused_before_memory_is_asked_for(
    tmp_path: Path, folder: Path, small_model: Path
) -> None:
    layers, width, header, shape = paths = [
        shutil.copytree(folder, tmp_path / name) for name in ("layers", "width", "header", "shape")
    ]
    write_config(layers, num_hidden_layers=10**12)
    write_config(width, hidden_size=2**62)
    content = (folder / "model.safetensors").read_bytes()
    (header / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + content[8:])
    size = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + size])
    told["esm.embeddings.word_embeddings.weight"]["shape"] = [2**31, 2**31]
    claimed = json.dumps(told).encode()
    rest = content[8 + size :]
    written = len(claimed).to_bytes(8, "little") + claimed + rest
    (shape / "model.safetensors").write_bytes(written)
    archive = load(small_model)
    archive["cfg"]["model"].encoder_layers = 10**12
    torch.save(archive, tmp_path / "layers.pt")
    found = refused_apart(*paths, tmp_path / "layers.pt")
    assert found[0] == "num_layers is 1000000000000 by checkpoint metadata, 2 by tensor shapes"
    assert found[1] == f"hidden_dim is {2**62} by checkpoint metadata, 64 by tensor shapes"
    for one, fact in ((header, found[2]), (shape, found[3])):
        refused = f"{one}/model.safetensors: Error while deserializing header: "
        assert fact.startswith(refused)
    assert found[4] == found[0]


def shapes(num_layers: int, hidden_dim: int) -> list[tuple[str, tuple[int, ...]]]:
    return list(ModelShape(num_layers, hidden_dim, 4, True).trunk_shapes().items())


def test_tensors_that_share_storage_and_claim_more_than_the_file_are_refused(
    tmp_path: Path,
) -> None:
    one = {shape: torch.zeros(shape) for _, shape in shapes(1, 64)}
    tied = {TRUNK + name: one[shape] for name, shape in shapes(400, 64)}
    torch.save({"model": tied}, tmp_path / "bomb.pt")
    held = (tmp_path / "bomb.pt").stat().st_size
    claimed = sum(tensor.numel() * 4 for tensor in tied.values())
    assert claimed > 50 * held
    assert refusal(tmp_path / "bomb.pt") == f"tensors claim {claimed} bytes, the file has {held}"


def test_overlapping_views_that_claim_more_than_the_file_are_refused(tmp_path: Path) -> None:
    base = torch.ones(1000)
    views = {f"a{i}": base[i:] for i in range(900)}
    torch.save({"model": views}, tmp_path / "bomb.pt")
    held = (tmp_path / "bomb.pt").stat().st_size
    claimed = 4 * sum(1000 - i for i in range(900))
    assert refusal(tmp_path / "bomb.pt") == f"tensors claim {claimed} bytes, the file has {held}"


def test_the_one_tied_pair_of_every_release_is_no_bomb(tmp_path: Path) -> None:
    make_model(tmp_path / "m.pt", 1, 1024, 1, dtype=torch.float16)
    state = load(tmp_path / "m.pt")["model"]
    embedding = state[f"{TRUNK}embed_tokens.weight"]
    assert state["encoder.lm_head.weight"].data_ptr() == embedding.data_ptr()
    assert found(tmp_path / "m.pt").shape.hidden_dim == 1024


@pytest.mark.parametrize(
    ("tensor", "fact"),
    [
        (
            torch.ones(33, 64).to_sparse(),
            "refused: its pickle asks for torch.serialization._get_layout, which is not in the "
            "allow-list",
        ),
        (torch.ones(64, 33).t(), NOT_WHOLE),
        (torch.ones(33, 64, device="meta"), NOT_WHOLE),
        (torch.ones(33, 128)[:, ::2], NOT_WHOLE),
    ],
    ids=["sparse", "transposed", "meta", "strided"],
)
def test_tensors_that_are_not_stored_whole_are_refused(
    tmp_path: Path, small_model: Path, tensor: torch.Tensor, fact: str
) -> None:
    path = save_changed(small_model, tmp_path / "m.pt", {"embed_tokens.weight": tensor})
    assert refusal(path) == fact


def retyped(source: Path, target: Path, dtype: torch.dtype, part: str = "") -> Path:
    archive = load(source)
    archive["model"] = {
        name: tensor.to(dtype) if part in name else tensor
        for name, tensor in archive["model"].items()
    }
    torch.save(archive, target)
    return target


@pytest.mark.parametrize("name", ["float64", "int8", "complex64", "float8_e4m3fn"])
def test_types_that_no_release_has_are_refused(
    tmp_path: Path, small_model: Path, name: str
) -> None:
    path = retyped(small_model, tmp_path / "m.pt", getattr(torch, name))
    assert refusal(path) == f"tensors of type {name}: {TRUNK}embed_tokens.weight and 34 more"


@pytest.mark.parametrize(
    ("part", "rarest"),
    [
        ("layers.1.fc1.bias", "layers.1.fc1.bias of type float16"),
        ("fc1", "layers.0.fc1.weight and 3 more of type float16"),
        ("layers", "embed_tokens.weight and 2 more of type float32"),
    ],
)
def test_mixed_types_are_refused_with_tensors_of_the_rarer(
    tmp_path: Path, small_model: Path, part: str, rarest: str
) -> None:
    """Before, no tensor was named."""
    path = retyped(small_model, tmp_path / "m.pt", torch.float16, part)
    assert refusal(path) == f"tensors of several types: float16, float32: {TRUNK}{rarest}"


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_types_of_releases_and_fine_tunes_are_read(
    tmp_path: Path, small_model: Path, name: str
) -> None:
    path = retyped(small_model, tmp_path / "m.pt", getattr(torch, name))
    assert found(path).properties["dtype"].value == name
    layers = hidden(path)
    assert all(torch.isfinite(layer).all() and layer.dtype == torch.float32 for layer in layers)


# ---- What is read


def test_tensors_are_read_as_stored(small_model: Path) -> None:
    state = load(small_model)["model"]
    weights = open_weights(small_model)
    names = [name for name, _ in shapes(2, 64)]
    read = dict(weights.read(names))
    assert list(read) == names
    assert all(torch.equal(tensor, state[TRUNK + name]) for name, tensor in read.items())


def test_the_digest_is_that_of_sha256sum(small_model: Path) -> None:
    told = subprocess.run(["sha256sum", small_model], capture_output=True, text=True, check=True)
    assert open_weights(small_model).sha256() == told.stdout.split()[0]


# ---- What make_model writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fair_esms_own_loader_reads_an_untrained_model(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "esm2_made.pt"
    regression = make_model(path, 2, 64, 4, dtype=dtype)
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = esm.pretrained.load_model_and_alphabet_local(str(path))
    assert (model.num_layers, model.embed_dim, model.attention_heads) == (2, 64, 4)
    state, loaded = load(path)["model"], model.state_dict()
    for name, _ in shapes(2, 64):
        assert torch.equal(loaded[name], state[TRUNK + name].float()), name
    contact = load(regression)["model"]
    assert torch.equal(loaded["contact_head.regression.weight"], contact[REGRESSION])


REGRESSION = "contact_head.regression.weight"


def made(path: Path, **keywords: Any) -> tuple[dict[str, bytes], bytes]:  # noqa: ANN401
    """The bytes of every tensor of a made model, and of its contact regression."""
    regression = make_model(path, 2, 32, 2, **keywords)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in load(path)["model"].items()}
    return tensors, load(regression)["model"][REGRESSION].numpy().tobytes()


def test_a_seed_decides_every_tensor(tmp_path: Path) -> None:
    first = made(tmp_path / "a.pt", seed=7)
    torch.rand(3)  # the global generator has no say
    assert made(tmp_path / "b.pt", seed=7) == first
    other = made(tmp_path / "c.pt", seed=8)
    assert other[1] != first[1]
    for name, _ in shapes(2, 32):
        assert other[0][TRUNK + name] != first[0][TRUNK + name], name


def test_half_precision_is_the_same_model_rounded(tmp_path: Path) -> None:
    make_model(tmp_path / "whole.pt", 2, 32, 2)
    make_model(tmp_path / "half.pt", 2, 32, 2, dtype=torch.float16)
    whole, half = load(tmp_path / "whole.pt")["model"], load(tmp_path / "half.pt")["model"]
    assert whole.keys() == half.keys()
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, whole[name].half()), name


def test_an_untrained_model_has_outlier_channels(small_model: Path) -> None:
    last_but_one = hidden(small_model)[1].abs().mean(0)
    largest = last_but_one.topk(5).values
    assert largest[3] > 20 * last_but_one.median()  # four of them
    assert largest[4] < 10 * last_but_one.median()


def test_an_untrained_model_says_so(small_model: Path) -> None:
    assert open_weights(small_model).untrained


def test_a_model_that_does_not_say_so_is_not_untrained(tmp_path: Path, small_model: Path) -> None:
    archive = load(small_model)
    del archive["cfg"]["model"].untrained
    torch.save(archive, tmp_path / "m.pt")
    assert not open_weights(tmp_path / "m.pt").untrained


# ---- Hugging Face folders

# transformers 4.x, models/esm/convert_esm.py: fair-esm's names, and theirs.
TO_HUGGING_FACE = {
    "embed_tokens.": "esm.embeddings.word_embeddings.",
    "emb_layer_norm_after.": "esm.encoder.emb_layer_norm_after.",
    "layers.": "esm.encoder.layer.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".self_attn.rot_emb.": ".attention.self.rotary_embeddings.",
    ".self_attn.out_proj.": ".attention.output.dense.",
    ".self_attn_layer_norm.": ".attention.LayerNorm.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
    ".final_layer_norm.": ".LayerNorm.",
}


def hugging_face_name(name: str) -> str:
    for ours, theirs in TO_HUGGING_FACE.items():
        name = name.replace(ours, theirs)
    return name


def hugging_face_state(source: Path) -> State:
    archive = load(source)["model"]
    return {
        hugging_face_name(name.removeprefix(TRUNK)): tensor.clone()
        for name, tensor in archive.items()
        if name.startswith(TRUNK)
    }


def write_config(folder: Path, **changes: object) -> None:
    config = {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "token_dropout": True,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "mask_token_id": 32,
        "is_folding_model": False,
        "vocab_size": 33,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path, small_model: Path) -> Path:
    """small_model as a Hugging Face folder with one safetensors file."""
    write_config(tmp_path / "hf")
    save_file(hugging_face_state(small_model), tmp_path / "hf/model.safetensors")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path, small_model: Path) -> Path:
    """small_model as a Hugging Face folder with two shards and an index."""
    write_config(tmp_path / "sharded")
    state = hugging_face_state(small_model)
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(list(state.items())[i::2])
        save_file(part, tmp_path / "sharded" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "sharded"


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_hugging_face_folder_is_the_same_model(
    request: pytest.FixtureRequest, small_model: Path, kind: str
) -> None:
    path = request.getfixturevalue(kind)
    detection = found(path)
    assert detection.weights is not None
    assert detection.weights.format == "huggingface"
    assert detection.name == path.name
    theirs = {key: prop.value for key, prop in detection.properties.items()}
    ours = {key: prop.value for key, prop in found(small_model).properties.items()}
    assert theirs == {**ours, "weights_format": "huggingface"}
    names = [name for name, _ in shapes(2, 64)]
    read = dict(detection.weights.read(names))
    assert sorted(read) == sorted(names)
    for name, tensor in open_weights(small_model).read(names):
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_hugging_face_folder_gives_the_same_vectors(
    request: pytest.FixtureRequest, small_model: Path, kind: str
) -> None:
    theirs, ours = hidden(request.getfixturevalue(kind)), hidden(small_model)
    assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))


def test_names_without_their_esm_are_read_too(
    tmp_path: Path, small_model: Path, folder: Path
) -> None:
    # EsmModel saves without the leading "esm." that EsmForMaskedLM has.
    state = {
        name.removeprefix("esm."): tensor
        for name, tensor in hugging_face_state(small_model).items()
    }
    save_file(state, folder / "model.safetensors")
    assert torch.equal(hidden(folder)[-1], hidden(small_model)[-1])


def test_the_digest_of_a_folder_is_that_of_its_sha256sum_listing(sharded: Path) -> None:
    listing = "sha256sum config.json model-*.safetensors | sha256sum"
    told = subprocess.run(
        ["sh", "-c", listing], capture_output=True, text=True, check=True, cwd=sharded
    )
    assert open_weights(sharded).sha256() == told.stdout.split()[0]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"model_type": "bert"}, "model_type 'bert', not 'esm'"),
        ({"model_type": None}, "model_type None, not 'esm'"),
        ({"is_folding_model": True}, "an ESMFold model (is_folding_model), not ESM-2"),
        (
            {"position_embedding_type": "absolute"},
            "position_embedding_type 'absolute': ESM-2 has 'rotary'",
        ),
        (
            {"emb_layer_norm_before": True},
            "emb_layer_norm_before is set: ESM-1b or ESM-1v, not ESM-2",
        ),
        (
            {"num_hidden_layers": 3},
            "num_layers is 3 by checkpoint metadata, 2 by tensor shapes",
        ),
        ({"hidden_size": "64"}, "metadata has hidden_dim = '64'"),
        ({"token_dropout": 1}, "metadata has token_dropout = '1'"),
    ],
)
def test_other_models_and_contradictions_are_refused(
    folder: Path, changes: dict[str, object], fact: str
) -> None:
    write_config(folder, **changes)
    assert refusal(folder) == fact


def test_an_empty_folder_is_refused(script: Script, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = script("detect", "--esm-model", tmp_path / "empty")
    assert answer.status == 2
    assert answer.error == f"{tmp_path}/empty/config.json: no such file"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path / "hf")
    (tmp_path / "hf/tf_model.h5").write_bytes(b"")
    fact = "no model.safetensors, no pytorch_model.bin and no index of shards"
    assert refusal(tmp_path / "hf") == fact


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_broken_config_json_is_refused(script: Script, folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    answer = script("detect", "--esm-model", folder)
    assert answer.status == 2
    assert answer.error.startswith(f"{folder}/config.json: not ")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, -1])
def test_truncated_safetensors_are_refused(script: Script, folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    answer = script("detect", "--esm-model", folder)
    assert answer.status == 2
    assert answer.error.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "..", ".", "", "shards/a", "missing.safetensors", 3],
)
def test_an_index_that_names_anything_but_files_of_the_folder_is_refused(
    script: Script, sharded: Path, name: object
) -> None:
    (sharded / "shards").mkdir()
    for place in (sharded.parent / "outside.safetensors", sharded / "shards/a"):
        place.write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"][next(iter(listed["weight_map"]))] = name
    index.write_text(json.dumps(listed))
    answer = script("detect", "--esm-model", sharded)
    assert answer.status == 2
    assert answer.error == f"{index}: names {str(name)!r}, which is not a file of the folder"


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", 3])
def test_an_index_without_a_map_is_refused(
    script: Script, sharded: Path, weight_map: object
) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    answer = script("detect", "--esm-model", sharded)
    assert (answer.status, answer.error) == (2, f"{index}: no weight_map")


def test_a_missing_shard_is_missing_tensors(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in listed.items() if "00001" in file}
    index.write_text(json.dumps({"weight_map": kept}))
    assert re.match(r"tensor esm\.encoder\.layer\.\S+ and \d+ more missing", refusal(sharded))


def test_a_head_that_is_not_the_embedding_is_refused(small_model: Path, tmp_path: Path) -> None:
    """fair-esm has one tensor for both, and loads the head's into it last."""
    content = load(small_model)
    head = content["model"]["encoder.lm_head.weight"]
    assert torch.equal(head, content["model"]["encoder.sentence_encoder.embed_tokens.weight"])
    content["model"]["encoder.lm_head.weight"] = head + 1
    path = tmp_path / "esm2_untied.pt"
    torch.save(content, path)
    regression = small_model.with_name(f"{small_model.stem}-contact-regression.pt")
    shutil.copy(regression, tmp_path / "esm2_untied-contact-regression.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        theirs, _ = esm.pretrained.load_model_and_alphabet_local(str(path))
    assert torch.equal(theirs.embed_tokens.weight, head + 1)
    with pytest.raises(
        WeightsError, match=r"lm_head\.weight differs from .*embed_tokens\.weight, fair-esm"
    ):
        load_model(load_settings(overrides={"model.esm_model": str(path)}), found(path))
