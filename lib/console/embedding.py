"""What embed.py, resume.py and neighbours.py share: model and input shown, work under a bar."""

from __future__ import annotations

from sqlalchemy import Engine

from lib.console.bars import ResidueBar
from lib.console.display import describe_detection, describe_input, describe_run, run_json
from lib.console.output import note, print_result, print_table
from lib.jobs.computing import ready_plan
from lib.jobs.embedding import Computer, Job, to_compute, work
from lib.jobs.interruption import Interruption
from lib.jobs.loading import KnownModel
from lib.jobs.progress import Progress
from lib.ledger.reuse_plan import ReusePlan
from lib.ledger.runs import Ownership, create_run
from lib.models.detection import Detection
from lib.sequences.inputs import input_sources
from lib.sequences.inventory import Inventory
from lib.settings import Settings
from schema.settings import STANDARD_INPUT
from schema.tables import Run

__all__ = [
    "embed_new_run",
    "embed_under_bar",
    "refuse_missing_input",
    "show_input",
    "show_model",
    "show_result",
]


def refuse_missing_input(settings: Settings) -> None:
    """Raise InputError for an input that is not there, before a model is looked for.

    Standard input is looked at when it is copied.
    """
    if STANDARD_INPUT not in (settings.input.fasta or []):
        input_sources(settings.input)


def show_model(detection: Detection, sha256: str | None = None) -> None:
    """Print the properties of a model, with its digest where it is known."""
    columns = ["property", "value", "source"]
    rows = describe_detection(detection, sha256)
    print_table(columns, rows, to_stderr=True, shortened={"value": 26, "source": 34})


def show_input(inventory: Inventory, settings: Settings) -> None:
    """Print what preflight found."""
    for line in describe_input(inventory, settings.input.max_residues):
        note(line)


def embed_new_run(
    engine: Engine,
    model: KnownModel,
    computer: Computer,
    inventory: Inventory,
    interruption: Interruption,
    purpose: str = "",
    label: str | None = None,
) -> Run:
    """Record a run and embed it, copying what earlier runs have; raises what `work` raises.

    purpose: printed behind the run's number; label: what its user calls it.
    """
    reuse = ready_plan(engine, model, computer, inventory, note)
    with (
        interruption.deferred(),
        create_run(
            engine, model.settings, model.config, inventory, model.facts, reuse, label
        ) as ownership,
    ):
        note(f"run {ownership.run.id}{purpose}")
        return embed_under_bar(engine, ownership, model, computer, inventory, reuse, interruption)


def embed_under_bar(
    engine: Engine,
    ownership: Ownership,
    model: KnownModel,
    computer: Computer,
    inventory: Inventory,
    reuse: ReusePlan | None,
    interruption: Interruption,
) -> Run:
    """Copy and compute what is left of a run and show how far it is; raises what `work` raises."""
    lengths, done = to_compute(ownership.run, inventory, reuse)
    width, at_once = model.config.hidden_dim, computer.reports_at_once
    progress = Progress(lengths, width, done, at_once)
    with ResidueBar(progress) as bar:
        return work(
            Job(
                engine, ownership, model.settings, inventory, computer, interruption, bar.advance,
                reuse, bar.copied, bar.expect, note,
            )
        )  # fmt: skip


def show_result(run: Run, *, as_json: bool) -> None:
    """Print where the result of a run lies."""
    print_result(run_json(run), [describe_run(run)], as_json=as_json)
