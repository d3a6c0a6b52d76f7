"""What embed.py and resume.py share: model and input shown, the work under a bar, the result."""

from __future__ import annotations

from sqlalchemy import Engine

from lib.console.bars import ResidueBar
from lib.console.display import describe_detection, describe_input, describe_run, run_json
from lib.console.output import note, print_result, print_table
from lib.jobs.embedding import Computer, Job, work
from lib.jobs.interruption import Interruption
from lib.jobs.loading import KnownModel
from lib.jobs.progress import Progress
from lib.ledger.runs import Ownership
from lib.models.detection import Detection
from lib.sequences.inventory import Inventory
from lib.settings import Settings
from schema.tables import Run

__all__ = ["embed_under_bar", "show_input", "show_model", "show_result"]


def show_model(detection: Detection, sha256: str | None = None) -> None:
    """Print the properties of a model, with its digest where it is known."""
    columns = ["property", "value", "source"]
    print_table(columns, describe_detection(detection, sha256), to_stderr=True)


def show_input(inventory: Inventory, settings: Settings) -> None:
    """Print what preflight found."""
    for line in describe_input(inventory, settings.input.max_residues):
        note(line)


def embed_under_bar(
    engine: Engine,
    ownership: Ownership,
    model: KnownModel,
    computer: Computer,
    inventory: Inventory,
    interruption: Interruption,
) -> Run:
    """Compute what is left of a run and show how far it is; raises what `work` raises."""
    committed = [range(one.first_position, one.stop_position) for one in ownership.run.checkpoints]
    width, at_once = model.config.hidden_dim, computer.reports_at_once
    progress = Progress(inventory.lengths, width, committed, at_once)
    with ResidueBar(progress) as bar:
        return work(
            Job(engine, ownership, model.settings, inventory, computer, interruption, bar.advance)
        )


def show_result(run: Run, *, as_json: bool) -> None:
    """Print where the result of a run lies."""
    print_result(run_json(run), [describe_run(run)], as_json=as_json)
