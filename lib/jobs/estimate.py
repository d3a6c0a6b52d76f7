"""Estimate: how long a run would take on this machine, and how much disk and memory it needs.

docs/how-long-and-how-big.md explains the formulas.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lib.columns import vector_bytes
from lib.errors import MachineError
from lib.jobs.loading import LoadedModel
from lib.jobs.progress import computing_cost
from lib.jobs.reuse import SEARCH_BYTES
from lib.ledger.checkpoints import ROW_GROUP_BYTES
from lib.network.device import packs_at_once
from lib.network.pipeline import computed
from lib.network.vectors import kept_on_host, needed_bytes
from lib.sequences.inventory import WINDOW_RECORDS, Inventory
from lib.sequences.plan import Pack, plan_packs
from lib.sequences.records import Owner
from lib.sequences.windows import Sequence as FastaSequence
from lib.settings import Settings
from schema.esm2_config import ESM2Config
from schema.parquet import vector_columns

__all__ = ["Estimate", "Trial", "disk_bytes", "estimate_run", "timed_trial"]

# A pack, as the residues of each of its sequences.
Lengths = Sequence[int]
Compute = Callable[[Sequence[Lengths]], None]

# Of the describing columns of a record, after compression: its digests 49 bytes, numbers the rest.
_DESCRIBING_BYTES = 55
_HEADER_SHARE = 0.25  # what zstd leaves of ids and descriptions
_FILE_BYTES = 5_000  # footer and page headers of a checkpoint file

_TRIAL_SECONDS = 15.0
_ENOUGH_SECONDS = 3.0  # a trial that took as long needs no further packs
_SAMPLE = 4096  # sequences from which the packs of a trial are made
_SMALL = 254  # residues of the sequence that warms up, and tells what larger packs would take

# Beside the weights and the packs: what libraries keep prepared for shapes that the trial had not
# (0.2 to 0.5 GB were measured), the rows that wait for a file, and the records of a window.
_PREPARED_BYTES = 400_000_000
_HELD_BYTES = 2 * ROW_GROUP_BYTES
_RECORD_BYTES = 1_000


@dataclass(frozen=True)
class Trial:
    """Packs that were computed to be timed. cost: as `computing_cost` gives it."""

    packs: int
    residues: int
    seconds: float
    cost: float


@dataclass(frozen=True)
class Estimate:
    """What a run would take here if nothing is copied from earlier ones.

    residues: of the different sequences, as they are embedded. disk_free: bytes on the disk of the
    output folder. memory, gpu_memory: bytes at the peak; the latter is None without a GPU.
    """

    records: int
    residues: int
    seconds: float
    disk: int
    disk_free: int
    memory: int
    gpu_memory: int | None
    device: str
    trial: Trial


def estimate_run(
    model: LoadedModel,
    inventory: Inventory,
    clock: Callable[[], float] = time.monotonic,
) -> Estimate:
    """Time a few packs with the lengths of an input, and say what all of it would take.

    clock: tells seconds. The memory is this process's peak after the trial, and what larger packs,
    other shapes, a window and waiting rows need beyond.
    """
    settings, width = model.settings, model.config.hidden_dim
    own = inventory.record_lengths[inventory.first_records()]
    needs = _Needs(model)
    trial = timed_trial(own, model, needs.compute, clock)
    seconds = computing_cost(own, width) * trial.seconds / trial.cost
    device = model.network.device
    cuda = device.type == "cuda"
    longest = int(own.max())
    beyond = max(0, needs.of_largest(longest) - needs.tried)
    held = _PREPARED_BYTES + _HELD_BYTES + _RECORD_BYTES * min(inventory.records, WINDOW_RECORDS)
    held += SEARCH_BYTES * inventory.sequences if settings.output.reuse else 0
    return Estimate(
        records=inventory.records,
        residues=inventory.residues,
        seconds=seconds,
        disk=disk_bytes(inventory, settings, model.config, seconds),
        disk_free=_disk_free(Path(settings.output.folder)),
        memory=_peak_bytes() + held + (needs.kept_of_largest(longest) if cuda else beyond),
        gpu_memory=torch.cuda.max_memory_allocated(device) + beyond if cuda else None,
        device=model.facts.device,
        trial=trial,
    )


def timed_trial(
    lengths: npt.NDArray[np.int32],
    model: LoadedModel,
    compute: Compute,
    clock: Callable[[], float],
) -> Trial:
    """Compute packs of some of an input's lengths, and time them.

    lengths: (N,) residues per sequence; compute: computes packs, at once where the device does.
    Small packs warm up and tell how long larger ones will take: those that would go beyond
    `_TRIAL_SECONDS` are left out, and if that is all of them, the small ones are what was timed.
    """
    width, at_once = model.config.hidden_dim, packs_at_once(model.network.device)
    small = [[min(_SMALL, int(lengths.max()))]] * at_once
    compute(small)
    trial = spent = _timed(small, compute, clock, width)
    timed: list[Trial] = []
    for packs in _rounds(lengths, model.settings.compute.tokens_per_pack, at_once):
        if timed and trial.seconds >= _ENOUGH_SECONDS:
            break
        ahead = sum(computing_cost(np.array(pack), width) for pack in packs)
        if spent.seconds + ahead * trial.seconds / trial.cost > _TRIAL_SECONDS:
            continue
        try:
            timed.append(_timed(packs, compute, clock, width))
        except MachineError:  # not enough memory: the run itself will say for which record
            continue
        spent = _together([spent, timed[-1]])
        trial = _together(timed)
    return trial


def disk_bytes(
    inventory: Inventory, settings: Settings, config: ESM2Config, seconds: float = 0.0
) -> int:
    """Return the bytes of the checkpoint files of a run of an input, which takes `seconds`."""
    output = settings.output
    columns = vector_columns(output.include, config.repr_layers)
    residues = inventory.record_lengths.astype(np.int64)
    vectors = sum(
        vector_bytes(column, residues, config.hidden_dim, output.per_tok_dtype)
        for column in columns
    )
    files = max(
        len(inventory.windows),
        inventory.records / output.checkpoint_records,
        seconds / max(1.0, output.checkpoint_seconds),
    )
    describing = _DESCRIBING_BYTES * inventory.records + _HEADER_SHARE * inventory.header_letters
    return round(vectors + describing + _FILE_BYTES * files)


def _rounds(lengths: npt.NDArray[np.int32], tokens: int, at_once: int) -> list[list[Lengths]]:
    """Return packs to time, in rounds of as many as are computed at once: long and short ones."""
    places = np.linspace(0, len(lengths) - 1, min(_SAMPLE, len(lengths))).astype(np.int64)
    sample = np.sort(lengths[places])[::-1].tolist()
    packs = [sample[pack.start : pack.stop] for pack in plan_packs(sample, tokens)]
    last = max(0, len(packs) - at_once)
    starts = dict.fromkeys(min(len(packs) * part // 8, last) for part in (2, 6, 1, 5))
    return [packs[start : start + at_once] for start in starts]


def _timed(
    packs: Sequence[Lengths], compute: Compute, clock: Callable[[], float], width: int
) -> Trial:
    start = clock()
    compute(packs)
    seconds = clock() - start
    cost = sum(computing_cost(np.array(pack), width) for pack in packs)
    return Trial(len(packs), sum(map(sum, packs)), seconds, cost)


def _together(trials: Sequence[Trial]) -> Trial:
    return Trial(
        sum(one.packs for one in trials),
        sum(one.residues for one in trials),
        sum(one.seconds for one in trials),
        sum(one.cost for one in trials),
    )


class _Needs:
    """Computes packs of made-up sequences, and knows the memory that packs need."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        output = model.settings.output
        self._columns = vector_columns(output.include, model.config.repr_layers)
        self.tried = 0

    def compute(self, packs: Sequence[Lengths]) -> None:
        """Compute packs and drop their vectors; remembers the most memory that any needed."""
        network, kind = self._model.network, self._model.settings.output.per_tok_dtype
        made = [Pack(range(len(pack)), _sequences(pack)) for pack in packs]
        needed = [needed_bytes(network, pack.sequences, self._columns) for pack in made]
        self.tried = max(self.tried, sum(needed))
        for _ in computed(network, made, self._columns, kind):
            pass

    def of_largest(self, longest: int) -> int:
        """Return the bytes that the largest packs need, if sequences have up to `longest`."""
        at_once = packs_at_once(self._model.network.device)
        return at_once * needed_bytes(self._model.network, self._largest(longest), self._columns)

    def kept_of_largest(self, longest: int) -> int:
        """Return the bytes of the CPU's memory that the vectors of two such packs on a GPU take."""
        return 2 * kept_on_host(self._model.network, self._largest(longest), self._columns)

    def _largest(self, longest: int) -> list[FastaSequence]:
        tokens = self._model.settings.compute.tokens_per_pack
        return _sequences([longest] * max(1, tokens // (longest + 2)))


def _sequences(lengths: Lengths) -> list[FastaSequence]:
    return [FastaSequence(b"L" * one, [Owner(0, "trial", "", one, "")]) for one in lengths]


def _disk_free(folder: Path) -> int:
    """Return the free bytes on the disk that a folder, which need not exist, is or will be on."""
    place = next(one for one in [folder, *folder.parents] if one.exists())
    return shutil.disk_usage(place).free


def _peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
