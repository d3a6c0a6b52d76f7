"""Admission: a run admitted to be continued, or refused at the first difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from lib.errors import (
    IdentityRefusedError,
    InputError,
    LedgerError,
    SettingsError,
    WeightsError,
)
from lib.ledger.audit import (
    Finding,
    audit,
    audit_completeness,
    audit_files,
    missing_positions,
)
from lib.ledger.history import refuse_pruned
from lib.ledger.identity import (
    check_digests,
    check_input,
    check_properties,
    check_regression,
    check_settings,
    check_sha256,
    run_config,
)
from lib.ledger.reuse_plan import ReusePlan, read_plan
from lib.ledger.standard_input import kept_name
from lib.models.detection import Detection, detect
from lib.models.layers import select_layers
from lib.sequences.inputs import input_sources, source_sha256
from lib.sequences.inventory import Inventory, preflight
from lib.settings import Overrides, Settings, from_snapshot, override
from schema.settings import STANDARD_INPUT
from schema.tables import Checkpoint, Run

__all__ = [
    "Admission",
    "admit",
    "check_overrides",
    "input_in_hand",
    "settings_of",
    "settings_to_continue",
    "weights_in_hand",
    "why_not_resumable",
]


@dataclass(frozen=True)
class Admission:
    """A run whose database rows, files, weights and input all belong together.

    `damaged` lists checkpoints whose files are lost or altered; they are only let through when
    they are to be computed again. `missing` lists positions that a finished run should have;
    `reuse` is what the run copies from earlier ones.
    """

    settings: Settings
    detection: Detection
    sha256: str
    inventory: Inventory
    damaged: list[Checkpoint]
    missing: list[range]
    reuse: ReusePlan | None


def admit(run: Run, overrides: Overrides, *, recompute_damaged: bool) -> Admission:
    """Check all that continuing a run rests on, before any tensor is read.

    overrides: "section.option" to text, for what lies elsewhere now or is not part of a run's
    identity. Raises SettingsError for a pruned run, and IdentityRefusedError at the first
    difference, and for damaged checkpoints, naming them all, unless `recompute_damaged`.
    """
    refuse_pruned(run.id, run.pruned_at)
    _refuse(audit(run, files=False))
    settings = settings_to_continue(run, overrides)
    check_overrides(run, settings, overrides)
    detection, sha256 = weights_in_hand(run, settings)
    inventory = input_in_hand(run, settings)
    findings = list(audit_files(run))
    _refuse(finding for finding in findings if not finding.damaged)
    if findings and not recompute_damaged:
        raise IdentityRefusedError("; ".join(finding.fact for finding in findings))
    damaged = [finding.checkpoint for finding in findings if finding.checkpoint is not None]
    missing = missing_positions(run) if run.status == "finished" else []
    _refuse(finding for finding in audit_completeness(run) if not finding.damaged)
    reuse = read_plan(run, inventory)
    return Admission(settings, detection, sha256, inventory, damaged, missing, reuse)


def settings_of(run: Run, overrides: Overrides) -> Settings:
    """Return the settings a run was started with, with its weights and input where they last lay.

    The input is the files that were read, so that a folder may have got others since.
    """
    try:
        settings = from_snapshot(run.settings)
    except SettingsError as error:
        raise IdentityRefusedError(f"run {run.id}: stored settings: {error}") from None
    files = [file.path for file in run.inputs]
    settings = replace(settings, input=replace(settings.input, fasta=files or None))
    if run.attempts:
        last = run.attempts[-1].weights_path
        settings = replace(settings, model=replace(settings.model, esm_model=last))
    return override(settings, overrides)


def settings_to_continue(run: Run, overrides: Overrides) -> Settings:
    """Return the settings of a run, `-` in the input being the standard input that it kept."""
    settings = settings_of(run, overrides)
    name = kept_name(run.uuid)
    kept = next((file.path for file in run.inputs if PurePath(file.path).name == name), None)
    if kept is None or settings.input.fasta is None:
        return settings
    files = [kept if path == STANDARD_INPUT else path for path in settings.input.fasta]
    return replace(settings, input=replace(settings.input, fasta=files))


def check_overrides(run: Run, settings: Settings, overrides: Overrides) -> None:
    """Compare a run with the settings it is to continue with, and with what they do not decide.

    Its layers are in its model's metadata, and its folder is on record. Raises
    IdentityRefusedError at the first difference, SettingsError for layers that no model has.
    """
    check_settings(run, settings)
    asked = settings.model.repr_layers
    if overrides.get("model.repr_layers") and asked is not None:
        layers = list(select_layers(asked, run_config(run).num_layers))
        if layers != run.repr_layers:
            raise IdentityRefusedError(
                f"run {run.id}: repr_layers is {run.repr_layers} in the run, {layers} in its "
                "settings"
            )
    folder = str(Path(run.output_folder).parent)
    if overrides.get("output.folder") and settings.output.folder != folder:
        raise IdentityRefusedError(
            f"run {run.id}: output folder is {folder} in the run, {settings.output.folder} in its "
            "settings"
        )


def weights_in_hand(run: Run, settings: Settings) -> tuple[Detection, str]:
    """Return the weights that the settings name, and their digest, both compared with the run.

    Raises IdentityRefusedError at the first difference, WeightsError if there are none.
    """
    try:
        # The layers are the run's: another model may not even have them.
        contacts = "contacts" in run.include
        model = replace(settings.model, repr_layers=None)
        found = detect(model, contacts=contacts, any_base=True)
    except SettingsError as error:
        raise IdentityRefusedError(f"run {run.id}: {error}") from None
    _check_properties(run, found)
    if found.weights is None:
        raise WeightsError(f"run {run.id}: weights of {found.name} are not on disk")
    sha256 = found.weights.sha256()
    _check_digests(run, found, sha256)
    config = run_config(run)
    named = replace(found, name=config.name)
    return named.with_layers(config.repr_layers, f"run {run.id}"), sha256


def input_in_hand(run: Run, settings: Settings) -> Inventory:
    """Return the preflight of the input that the settings name, compared with the run's.

    Raises IdentityRefusedError if its content changed, InputError if there is none.
    """
    try:
        inventory = preflight(settings.input)
    except InputError:
        # What has another digest is another input, whatever else is wrong with it.
        sources = input_sources(settings.input)
        check_digests(run, [(source.name, source_sha256(source)) for source in sources])
        raise
    check_input(run, inventory)
    return inventory


def _refuse(findings: Iterator[Finding]) -> None:
    first = next(findings, None)
    if first is not None:
        raise IdentityRefusedError(first.fact)


def why_not_resumable(run: Run, detection: Detection, sha256: str) -> str | None:
    """Return why a run cannot be continued with these weights, or None; files are not read."""
    try:
        _refuse(audit(run, files=False))
        check_settings(run, settings_of(run, {}))
        _check_properties(run, detection)
        _check_digests(run, detection, sha256)
    except LedgerError as error:
        return str(error)
    return None


def _check_properties(run: Run, detection: Detection) -> None:
    """Compare detected properties with the run's.

    The name and the layers are left out: a file may be renamed, and the layers are the run's.
    """
    keys = run_config(run).snapshot().keys() - {"repr_layers"}
    found = {key: prop.value for key, prop in detection.properties.items() if key in keys}
    if detection.weights is not None:
        found["untrained"] = detection.untrained
    check_properties(run, found, _place(detection))


def _check_digests(run: Run, detection: Detection, sha256: str) -> None:
    """Compare the digests of the weights and, with contacts, of the contact regression.

    Raises WeightsError if the contact regression is not there.
    """
    check_sha256(run, sha256, _place(detection))
    if "contacts" in run.include:
        regression = detection.regression or detection.find_regression()
        check_regression(run, regression.sha256 or sha256, regression.path)


def _place(detection: Detection) -> str:
    return str(detection.weights.path) if detection.weights else f"the catalog ({detection.name})"
