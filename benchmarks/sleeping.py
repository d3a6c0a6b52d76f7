"""Sleeping workers: all of them is real but the network, which sleeps for as long as it takes."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.columns import Vectors
from lib.jobs.actor import Actor
from lib.jobs.messages import Answer, Readiness
from lib.jobs.progress import computing_cost
from lib.ledger.checkpoints import CheckpointWriter, temporary_name

__all__ = ["SLEEP", "Sleep", "SleepingActor"]

SLEEP = "ESM_LEDGER_SLEEP"  # the environment holds a Sleep as JSON


@dataclass(frozen=True)
class Sleep:
    """config: the identity of the weights; width: of a vector; rate: cost in a second."""

    config: Mapping[str, Any]
    width: int
    rate: float


class SleepingActor(Actor):
    """A worker whose network is a sleep; messages, files and digests are as ever."""

    def load(self, settings: Any) -> Readiness:  # noqa: ANN401
        """Import what an order is made of, and be ready."""
        importlib.import_module("lib.jobs.worker")
        self._sleep = Sleep(**json.loads(os.environ[SLEEP]))
        return Readiness("cpu", "sleep", "none", 1, settings.model.esm_model, self._sleep.config)

    def compute(self, order: Any, packs: Any) -> Any:  # noqa: ANN401
        """Sleep for as long as the packs cost, and write vectors of zeros."""
        start, rules, width = time.monotonic(), order.rules, self._sleep.width
        lengths = [len(one.residues) for pack in packs for one in pack.sequences]
        sequences = [one for pack in packs for one in pack.sequences]
        positions = range(packs[0].positions.start, packs[-1].positions.stop)
        name = temporary_name(rules.attempt_id, positions.start, rules.token)
        writer = CheckpointWriter(rules.folder, name, rules.columns, rules.footer)
        zeros = np.zeros((len(lengths), width), np.float32)
        writer.add(sequences, Vectors(dict.fromkeys(order.columns, zeros)))
        cost = computing_cost(np.asarray(lengths), width)
        time.sleep(max(0.0, cost / self._sleep.rate - (time.monotonic() - start)))
        file = writer.finish(positions, sum(lengths), time.monotonic() - start)
        spent = time.monotonic() - start
        return Answer(len(packs), name, file.records, file.bytes, file.sha256, spent), None
