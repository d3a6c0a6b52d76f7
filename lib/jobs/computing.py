"""Computing: the model of a run made ready where the settings say, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import Engine

from lib.jobs.crew import crew
from lib.jobs.dispatch import Workers
from lib.jobs.embedding import Computer, ThisProcess
from lib.jobs.interruption import Interruption
from lib.jobs.loading import KnownModel, know_model, load_model
from lib.jobs.ray_cluster import joined
from lib.jobs.reuse import plan_reuse
from lib.ledger.reuse_plan import ReusePlan
from lib.ledger.sources import Wanted
from lib.ledger.twins import describe_twin, finished_twin
from lib.models.detection import Detection
from lib.sequences.inventory import Inventory
from lib.settings import Settings

__all__ = ["made_ready", "ready_plan"]


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
    or the computer is told to make ready; else both are done now, beside the digest if that is not
    known. Raises what `load_model` raises, and MachineError for a cluster that fails.
    """
    if settings.cluster.ray is None:
        if later or sha256 is not None:
            known = know_model(settings, detection, sha256)
            here = ThisProcess(known.device, known.load)
            if not later:
                here.make_ready()
            yield known, here
        else:  # the digest is taken beside the load
            model = load_model(settings, detection)
            yield model, ThisProcess(model.network.device, lambda: model.network)
        return
    with (
        ExitStack() as after,
        joined(settings.cluster, interruption) as where,
        crew(settings, detection, sha256, where, interruption, say, later) as (found, started),
    ):
        workers = Workers(started)
        after.callback(workers.remove_unneeded)  # when no worker is left
        yield found, workers


def ready_plan(
    engine: Engine,
    model: KnownModel,
    computer: Computer,
    inventory: Inventory,
    say: Callable[[str], None],
) -> ReusePlan | None:
    """Plan what a new run copies from earlier ones, and make `computer` ready if anything is left.

    `say` is told of a finished run that has the very vectors, and what `plan_reuse` tells. Raises
    what `plan_reuse` and `Computer.make_ready` raise.
    """
    twin = finished_twin(engine, Wanted(model.config, model.settings), inventory)
    if twin is not None:
        say(describe_twin(twin))
    plan = plan_reuse(engine, model.settings, model.config, inventory, say)
    if plan is None or len(plan) < inventory.sequences:
        computer.make_ready()
    return plan
