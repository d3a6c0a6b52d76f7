"""Swaps: weights that change place between digest and load are used as digested, or refused.

If these fail, a run that every check calls good holds vectors of two models, or names a model that
did not make them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lib.models.regression import regression_path
from lib.models.untrained import make_folder, make_model
from tests import processes
from tests.adapters import QUERY, factors, save_adapter
from tests.conftest import SOME_PROTEINS, Place
from tests.reference import assert_same_bits

KINDS = ("weights", "folder", "config.json", "shard", "adapter", "base", "contact regression")


@dataclass(frozen=True)
class Swap:
    """A model, the file of it that changes place, and what is put there instead.

    Both files are good, and of the same size: nothing but their numbers differs.
    """

    model: Path
    file: Path
    other: Path
    base: Path | None = None

    @property
    def flags(self) -> list[str]:
        flags = ["--esm-model", str(self.model)]
        return flags if self.base is None else [*flags, "--set", f"model.base_model={self.base}"]


def swap_of(folder: Path, kind: str) -> Swap:
    """Make a model of two layers in a folder, and another one beside it for a swap."""
    one, other = folder / "one", folder / "other"
    if kind in ("weights", "contact regression", "base", "adapter"):
        for made, seed in ((one, 0), (other, 1)):
            made.mkdir()
            make_model(made / "m.pt", 2, 64, 4, seed=seed)
    else:
        make_folder(one, 2, 64, 4)
        make_folder(other, 2, 64, 4, seed=1)
    if kind == "weights":
        return Swap(one / "m.pt", one / "m.pt", other / "m.pt")
    if kind == "contact regression":
        return Swap(one / "m.pt", regression_path(one / "m.pt"), regression_path(other / "m.pt"))
    if kind == "base":
        adapter = save_adapter(folder / "lora", None, factors(QUERY, 64, 64))
        return Swap(adapter, one / "m.pt", other / "m.pt", one / "m.pt")
    if kind == "adapter":
        mine, theirs = (
            save_adapter(
                folder / name,
                one / "m.pt",
                {key: part * scale for key, part in factors(QUERY, 64, 64).items()},
            )
            for name, scale in (("lora", 1.0), ("theirs", 3.0))
        )
        return Swap(mine, *(path / "adapter_model.safetensors" for path in (mine, theirs)))
    if kind == "shard":
        for path in (one, other):
            sharded(path)
        return Swap(one, *(path / "model-2.safetensors" for path in (one, other)))
    if kind == "config.json":
        config = json.loads((one / "config.json").read_text()) | {"token_dropout": False}
        told = json.dumps(config)
        size = (one / "config.json").stat().st_size
        (other / "config.json").write_text(told + " " * (size - len(told)))
        return Swap(one, *(path / "config.json" for path in (one, other)))
    return Swap(one, *(path / "model.safetensors" for path in (one, other)))


def sharded(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- The swaps, done in the process of the script when it is about to read the tensors


def copy_over(swap: Swap) -> None:
    """Write the other file onto the same inode; size and time of the last write stay."""
    before = swap.file.stat()
    with swap.file.open("r+b") as file:
        file.write(swap.other.read_bytes())
    os.utime(swap.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = swap.file.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert after.st_mtime_ns == before.st_mtime_ns


def replace(swap: Swap) -> None:
    """Give the name to another file, which says the same time of its last write."""
    before = swap.file.stat()
    copy = swap.file.with_name("copy")
    shutil.copy(swap.other, copy)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(swap.file)


def turn(link: Path, target: Path) -> None:
    """Let a symbolic link lead elsewhere, in one step."""
    turned = link.with_name("turned")
    turned.symlink_to(target)
    turned.replace(link)


def turn_while(function: str, link: Path, there: Path) -> None:
    """Let a link lead elsewhere while a function runs, and a tenth of a second longer."""
    back = link.readlink()

    def restore() -> None:
        time.sleep(0.1)
        turn(link, back)

    processes.at_call(function, 0, partial(turn, link, there))
    processes.at_call(function, 0, restore, after=True)


def reader_of(kind: str) -> str:
    """The function that reads what changes place, after all else was read or opened."""
    if kind == "contact regression":
        return "lib.models.regression.load_archive"
    return "lib.jobs.loading.load_network"


def embed(place: Place, swap: Swap, prepare: Callable[[], None] | None = None) -> processes.Answer:
    include = ["mean", "contacts"] if "contact" in swap.file.name else ["mean"]
    flags = [*swap.flags, "--input", SOME_PROTEINS, "--include", *include]
    return processes.run("embed", *flags, "--config", place.config, prepare=prepare)


def resume(place: Place, swap: Swap, prepare: Callable[[], None] | None = None) -> processes.Answer:
    """Compute again what the only checkpoint of run 1 held."""
    (checkpoint,) = (place.output / "run-000001").glob("*.parquet")
    checkpoint.unlink()
    flags = ["--run", "1", *swap.flags, "--recompute-damaged"]
    return processes.run("resume", *flags, "--config", place.config, prepare=prepare)


@pytest.mark.parametrize("way", [copy_over, replace], ids=["copied over", "replaced"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_between_digest_and_load_is_refused(
    place: Place, kind: str, way: Callable[[Swap], None]
) -> None:
    """Before, a file that was copied over its inode passed, with the numbers of the other."""
    swap = swap_of(place.folder, kind)
    prepare = partial(processes.at_call, reader_of(kind), 0, partial(way, swap))
    answer = embed(place, swap, prepare)
    assert (answer.status, answer.error) == (2, f"{swap.file}: changed while it was being read")
    assert not list(place.output.rglob("*.parquet"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_refuses_such_a_file_too(place: Place, kind: str) -> None:
    swap = swap_of(place.folder, kind)
    assert embed(place, swap).status == 0
    prepare = partial(processes.at_call, reader_of(kind), 0, partial(copy_over, swap))
    answer = resume(place, swap, prepare)
    assert (answer.status, answer.error) == (2, f"{swap.file}: changed while it was being read")
    assert not list(place.output.rglob("*.parquet"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_is_turned_for_a_moment_changes_nothing(place: Place, kind: str) -> None:
    """Before, the other file was read, and the run ended good with the digest of the first.

    None of the trials would show anything if the other file gave the same vectors.
    """
    swap = swap_of(place.folder, kind)
    mine = swap.file.with_name(f"mine-{swap.file.name}")
    swap.file.rename(mine)
    swap.file.symlink_to(mine)
    answer = embed(place, swap)
    assert answer.status == 0, answer.err
    undisturbed = shutil.copytree(place.output / "run-000001", place.folder / "undisturbed")
    prepare = partial(turn_while, reader_of(kind), swap.file, swap.other)
    for again, run in ((embed, 2), (resume, 1)):
        answer = again(place, swap, prepare)
        assert answer.status == 0, answer.err
        assert_same_bits(place.output / f"run-00000{run}", undisturbed)
    copy_over(swap)
    answer = embed(place, swap)
    assert answer.status == 0, answer.err
    with pytest.raises(AssertionError):
        assert_same_bits(place.output / "run-000003", undisturbed)


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_a_folder_that_is_turned_for_a_moment_changes_nothing(place: Place, kind: str) -> None:
    swap = swap_of(place.folder, kind)
    link = place.folder / "link"
    link.symlink_to(swap.model)
    linked = Swap(link, swap.file, swap.other)
    answer = embed(place, linked)
    assert answer.status == 0, answer.err
    prepare = partial(turn_while, reader_of(kind), link, swap.other.parent)
    answer = embed(place, linked, prepare)
    assert answer.status == 0, answer.err
    assert_same_bits(place.output / "run-000002", place.output / "run-000001")
