"""Validation: everything that can be known to be wrong before work starts; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lib.errors import IdentityRefusedError, LedgerError, MachineError, WeightsError
from lib.jobs.admission import (
    check_overrides,
    input_in_hand,
    settings_to_continue,
    weights_in_hand,
    why_not_resumable,
)
from lib.jobs.estimate import Estimate, estimate_run
from lib.jobs.loading import LoadedModel, load_model, try_model
from lib.ledger.audit import audit, audit_completeness
from lib.ledger.database import open_for_reading
from lib.ledger.history import refuse_pruned
from lib.ledger.runs import load_run, unfinished_runs
from lib.ledger.sqlite_file import database_path
from lib.models.detection import Detection, detect
from lib.sequences.inventory import Inventory, preflight
from lib.settings import Overrides, Settings
from lib.units import records
from schema.tables import Run

__all__ = [
    "RunAudit",
    "Unfinished",
    "Validation",
    "audit_run",
    "list_unfinished",
    "try_run",
    "validate",
]


@dataclass(frozen=True)
class RunAudit:
    """What an audit found of one run: every fact, and the exit status that fits them.

    `settings` and `detection` are what the run can go on with; None if it cannot.
    """

    run: Run
    facts: list[str]
    exit_status: int
    settings: Settings | None
    detection: Detection | None
    sha256: str | None


@dataclass(frozen=True)
class Unfinished:
    """An unfinished run, and why it cannot be continued with the model in hand, if so."""

    run_id: int
    reason: str | None


@dataclass(frozen=True)
class Validation:
    """What a validation without a run found: all of it good, or it would have raised."""

    model: LoadedModel
    inventory: Inventory | None
    estimate: Estimate | None
    max_residues: int
    unfinished: list[Unfinished]


def validate(
    settings: Settings, say: Callable[[str], None], standard_input: Path | None = None
) -> Validation:
    """Check settings, weights, input and database, in this order; `say` is told what is good.

    standard_input: the file in which it is kept meanwhile. The weights are digested, loaded and
    tried on one short sequence, and on a few packs if there is an input, to estimate what a run of
    it takes. Raises the LedgerError of the first thing that is wrong.
    """
    detection = detect(settings.model, contacts="contacts" in settings.output.include)
    say(f"settings: good, model {detection.name}")
    if detection.weights is None:
        absent = f"{detection.released}: weights are not on disk"
        raise WeightsError(f"{absent} (make download and embed download them)")
    model = load_model(settings, detection)
    try_model(model)
    say(f"model: good, one short sequence embedded on {model.facts.device}")
    inventory, estimate = None, None
    if settings.input.fasta is not None:
        inventory = preflight(settings.input, standard_input)
        say(f"input: good, {records(inventory.records)}")
        estimate = estimate_run(model, inventory)
    unfinished = list_unfinished(settings.database.url, model, detection)
    return Validation(model, inventory, estimate, settings.input.max_residues, unfinished)


def audit_run(url: str, run_id: int, overrides: Overrides, output: Path | None = None) -> RunAudit:
    """Check a run's rows and checkpoint files, then the weights and the input in hand.

    overrides: "section.option" to text, for what lies elsewhere now; output: where the run's folder
    does. No tensor is read. Raises SettingsError if there is no such run or it is pruned, and what
    `given_folder` raises.
    """
    engine = open_for_reading(url)
    try:
        run = load_run(engine, run_id, output)
        refuse_pruned(run.id, run.pruned_at)
    finally:
        engine.dispose()
    errors: list[LedgerError] = []
    try:
        for finding in chain(audit(run, files=True), audit_completeness(run)):
            errors.append(IdentityRefusedError(finding.fact))
    except MachineError as error:
        errors.append(error)
    settings, detection, sha256 = None, None, None
    try:
        settings = settings_to_continue(run, overrides)
        check_overrides(run, settings, overrides)
        detection, sha256 = weights_in_hand(run, settings)
    except LedgerError as error:
        errors.append(error)
    if settings is not None:
        try:
            input_in_hand(run, settings)
        except LedgerError as error:
            errors.append(error)
    facts = list(dict.fromkeys(str(error) for error in errors))
    statuses = {error.exit_status for error in errors}
    # A difference in identity outranks whatever else was found.
    refused = IdentityRefusedError.exit_status
    status = refused if refused in statuses else max(statuses, default=0)
    return RunAudit(run, facts, status, settings, detection, sha256)


def try_run(audit: RunAudit) -> None:
    """Load the weights of a run whose audit was good, and try them on one short sequence."""
    assert audit.settings is not None
    assert audit.detection is not None
    assert audit.sha256 is not None
    try_model(load_model(audit.settings, audit.detection, audit.sha256))


def list_unfinished(url: str, model: LoadedModel, detection: Detection) -> list[Unfinished]:
    """Return every unfinished run, newest first, and whether this model can continue it."""
    if not database_path(url).exists():
        return []
    engine = open_for_reading(url)
    try:
        found = []
        for run_id in unfinished_runs(engine):
            try:
                run = load_run(engine, run_id)
                reason = why_not_resumable(run, detection, model.config.sha256)
            except LedgerError as error:
                reason = str(error)
            found.append(Unfinished(run_id, reason))
        return found
    finally:
        engine.dispose()
