"""Worker: the side that computes. It is given packs, and knows neither plan nor database."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.errors import LedgerError
from lib.files import disk_errors
from lib.jobs.loading import load_model
from lib.jobs.messages import Answer, Failure, Readiness
from lib.jobs.stretches import StretchRules, finished_stretches
from lib.ledger.checkpoints import FinishedStretch
from lib.models.detection import detect
from lib.network.pipeline import StoppedError, computed
from lib.sequences.plan import Pack
from lib.settings import Settings
from schema.parquet import VectorColumn

__all__ = ["Order", "Worker"]


@dataclass(frozen=True)
class Order:
    """How a stretch is computed; sent: its file goes to the driver as bytes, not by the folder."""

    rules: StretchRules
    columns: Sequence[VectorColumn]
    per_tok_dtype: str
    sent: bool


class Worker:
    """A loaded model that computes one stretch after another."""

    def __init__(self, settings: Settings) -> None:
        """Load the weights; raises LedgerErrors as `load_model` does."""
        contacts = "contacts" in settings.output.include
        # The driver compares the digests.
        detection = detect(settings.model, contacts=contacts, any_base=True)
        model = load_model(settings, detection)
        self._network = model.network
        facts = model.facts
        self.readiness = Readiness(
            device=facts.device,
            device_name=facts.device_name,
            attention=facts.attention,
            threads=facts.threads,
            weights_path=str(facts.weights_path),
            config=model.config.snapshot(),
        )

    def compute(
        self, order: Order, packs: Sequence[Pack], stopped: Callable[[], bool]
    ) -> tuple[Answer, npt.NDArray[np.uint8] | None]:
        """Compute packs into one file, in the folder of the rules or to be sent.

        packs: consecutive, of one window. Once `stopped` returns true, no pack is begun. Returns
        the file's bytes if they are to be sent.
        """
        if not order.sent:
            return self._computed(order, packs, stopped)[0], None
        with tempfile.TemporaryDirectory(prefix="esm-ledger-") as folder:
            rules = replace(order.rules, folder=Path(folder))
            answer, file = self._computed(replace(order, rules=rules), packs, stopped)
            if file is None:
                return answer, None
            try:
                with disk_errors(file):
                    return answer, np.fromfile(file, np.uint8)
            except LedgerError as error:
                return Answer(0, failure=Failure.of(error)), None

    def _computed(
        self, order: Order, packs: Sequence[Pack], stopped: Callable[[], bool]
    ) -> tuple[Answer, Path | None]:
        begun: list[FinishedStretch] = []
        failure: Failure | None = None
        on_way = computed(self._network, packs, order.columns, order.per_tok_dtype, stopped)
        try:
            with closing(finished_stretches(on_way, order.rules, lambda _pack: None)) as stretches:
                begun += stretches
        except StoppedError:
            pass
        except LedgerError as error:
            failure = Failure.of(error)
        if not begun:
            return Answer(0, failure=failure), None
        (stretch,) = begun
        done = sum(pack.positions.stop <= stretch.positions.stop for pack in packs)
        file = stretch.file
        answer = Answer(
            packs=done,
            name=file.temporary.name,
            records=file.records,
            bytes=file.bytes,
            sha256=file.sha256,
            seconds=stretch.seconds,
            failure=failure,
        )
        return answer, file.temporary
