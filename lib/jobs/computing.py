"""Computing: the model of a run made ready where the settings say, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lib.jobs.crew import crew
from lib.jobs.dispatch import Workers
from lib.jobs.embedding import Computer, ThisProcess
from lib.jobs.interruption import Interruption
from lib.jobs.loading import KnownModel, know_model, load_model
from lib.jobs.ray_cluster import joined
from lib.models.detection import Detection
from lib.settings import Settings

__all__ = ["made_ready"]


@contextmanager
def made_ready(
    settings: Settings,
    detection: Detection,
    sha256: str | None,
    interruption: Interruption,
    say: Callable[[str], None],
    *,
    later: bool = False,
) -> Iterator[tuple[KnownModel, Computer]]:
    """Yield the detected model and what computes with it, until the end of the block.

    sha256: the digest of the weights, if it is known. `say` is told of workers that are refused or
    lost. later: whether no tensor is read and no worker is started before something is computed,
    or the computer is told to make ready; else both are done while the digest is taken. Raises what
    `load_model` raises, and MachineError for a cluster that fails.
    """
    if settings.cluster.ray is None:
        if later:
            known = know_model(settings, detection, sha256)
            yield known, ThisProcess(known.device, known.load)
        else:
            model = load_model(settings, detection, sha256)
            yield model, ThisProcess(model.network.device, lambda: model.network)
        return
    with (
        joined(settings.cluster, interruption) as where,
        crew(settings, detection, sha256, where, interruption, say, later) as (found, started),
    ):
        yield found, Workers(started)
