"""Identity: a run, its checkpoints, the weights and the input in hand belong together, or stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import IdentityRefusedError
from lib.files import file_sha256
from lib.ledger.checkpoints import CHECKPOINT_NAME, leftovers
from lib.ledger.footer import read_footer
from lib.models.detection import Detection
from lib.sequences.inventory import Inventory
from lib.sequences.plan import PLAN
from lib.settings import Settings
from schema.esm2_config import ESM2Config, load_snapshot
from schema.tables import Checkpoint, Run

__all__ = [
    "Finding",
    "audit",
    "audit_files",
    "check_input",
    "check_properties",
    "check_settings",
    "check_sha256",
    "run_config",
    "run_identity",
    "settings_identity",
]


@dataclass(frozen=True)
class Finding:
    """What an audit found wrong with a run.

    `damaged` tells a checkpoint file that is lost or altered (it can be computed again) from a
    difference in identity (it cannot).
    """

    fact: str
    damaged: bool
    checkpoint: Checkpoint | None = None


def settings_identity(settings: Settings) -> dict[str, Any]:
    """Return the settings that are part of a run's identity, by their column in `runs`."""
    return {
        "include": list(settings.output.include),
        "precision": settings.compute.precision,
        "per_tok_dtype": settings.output.per_tok_dtype,
        "max_residues": settings.input.max_residues,
        "long_sequences": settings.input.long_sequences,
        "unknown_residues": settings.input.unknown_residues,
        "duplicate_ids": settings.input.duplicate_ids,
    }


def run_identity(run: Run) -> dict[str, Any]:
    """Return everything that identifies a run, as its checkpoint footers repeat it."""
    return {
        "uuid": run.uuid,
        "repr_layers": run.repr_layers,
        "include": run.include,
        "precision": run.precision,
        "per_tok_dtype": run.per_tok_dtype,
        "max_residues": run.max_residues,
        "long_sequences": run.long_sequences,
        "unknown_residues": run.unknown_residues,
        "duplicate_ids": run.duplicate_ids,
        "plan": run.plan,
        "input_sha256": run.input_sha256,
        "esm2_config": run.esm2_config,
    }


def run_config(run: Run) -> ESM2Config:
    """Return the model of a run; raises IdentityRefusedError if its metadata is not whole."""
    try:
        return load_snapshot(run.esm2_config)
    except ValueError as error:
        raise IdentityRefusedError(f"run {run.id}: {error}") from None


def check_properties(run: Run, detection: Detection) -> None:
    """Compare a run's model with detected properties; no digest is needed for these.

    The name and the layers are left out: a file may be renamed, and the layers are the run's.
    Raises IdentityRefusedError at the first difference.
    """
    expected = run_config(run).snapshot()
    found = {key: prop.value for key, prop in detection.properties.items() if key in expected}
    found.pop("repr_layers")
    if detection.weights is not None:
        found["untrained"] = detection.untrained
    difference = _first_difference({key: expected[key] for key in found}, found)
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"run {run.id}: {key} is {was} in the run, {now} in {_place(detection)}"
        )


def check_sha256(run: Run, detection: Detection, sha256: str) -> None:
    """Compare the digest of the weights in hand with the run's; with contacts, the regression's.

    Raises IdentityRefusedError if they are other weights of the same shape, WeightsError if the
    contact regression is not there.
    """
    expected = run_config(run).sha256
    if sha256 != expected:
        raise IdentityRefusedError(
            f"run {run.id}: sha256 of the weights is {expected} in the run, {sha256} in "
            f"{_place(detection)}"
        )
    if "contacts" in run.include:
        regression = detection.regression or detection.find_regression()
        found = regression.sha256 or sha256
        recorded = run_config(run).contact_regression_sha256
        if found != recorded:
            raise IdentityRefusedError(
                f"run {run.id}: sha256 of the contact regression is {recorded} in the run, "
                f"{found} in {regression.path}"
            )


def check_input(run: Run, inventory: Inventory) -> None:
    """Compare the FASTA in hand with the run's; raises IdentityRefusedError if it changed."""
    expected = {
        "sha256": run.input_sha256,
        "records": run.records_total,
        "sequences": run.sequences_total,
        "residues": run.residues_total,
    }
    difference = _first_difference(expected, {key: getattr(inventory, key) for key in expected})
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"run {run.id}: {key} of the input is {was} in the run, {now} in {inventory.path}"
        )


def check_settings(run: Run, settings: Settings) -> None:
    """Compare a run's columns with the settings it is to continue with.

    Raises IdentityRefusedError at the first difference, and for a plan of another version.
    """
    expected = run_identity(run)
    wanted = settings_identity(settings)
    difference = _first_difference({key: expected[key] for key in wanted}, wanted)
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"run {run.id}: {key} is {was} in the run, {now} in its settings"
        )
    if run.plan != PLAN:
        raise IdentityRefusedError(
            f"run {run.id}: plan is {run.plan!r}, this program's is {PLAN!r}"
        )


def audit(run: Run, *, files: bool) -> Iterator[Finding]:
    """Yield what is wrong with a run's metadata, its checkpoints' and, if asked, their files."""
    try:
        config = run_config(run)
    except IdentityRefusedError as error:
        yield Finding(str(error), damaged=False)
        return
    yield from _audit_run_row(run, config)
    position = 0
    for checkpoint in run.checkpoints:
        facts = list(_audit_row(run, config, checkpoint))
        if checkpoint.first_position < position or checkpoint.stop_position <= position:
            facts.append("its positions overlap those of another checkpoint")
        position = max(position, checkpoint.stop_position)
        for fact in facts:
            yield Finding(_of(checkpoint, fact), damaged=False, checkpoint=checkpoint)
        if files and not facts:
            yield from _audit_file(run, checkpoint)
    if files:
        yield from _audit_leftovers(run)
    if position > run.sequences_total:
        yield Finding(
            f"run {run.id}: checkpoints reach position {position} of {run.sequences_total}",
            damaged=False,
        )


def audit_files(run: Run) -> Iterator[Finding]:
    """Yield what is wrong with the files of a run whose rows have been found good."""
    for checkpoint in run.checkpoints:
        yield from _audit_file(run, checkpoint)
    yield from _audit_leftovers(run)


def _audit_run_row(run: Run, config: ESM2Config) -> Iterator[Finding]:
    if run.repr_layers != list(config.repr_layers):
        yield Finding(
            f"run {run.id}: repr_layers is {run.repr_layers} in the row, "
            f"{list(config.repr_layers)} in its model metadata",
            damaged=False,
        )
    if ("contacts" in run.include) != (config.contact_regression_sha256 is not None):
        yield Finding(
            f"run {run.id}: include is {run.include} in the row, contact_regression_sha256 "
            f"{config.contact_regression_sha256} in its model metadata",
            damaged=False,
        )
    if run.model is None:
        yield Finding(f"run {run.id}: model_id is {run.model_id}: no such model", damaged=False)
        return
    snapshot = config.weights_snapshot()
    columns = {key: getattr(run.model, key) for key in snapshot}
    difference = _first_difference({key: snapshot[key] for key in columns}, columns)
    if difference:
        key, was, now = difference
        yield Finding(
            f"run {run.id}: {key} is {was} in its model metadata, {now} in models", damaged=False
        )


def _audit_row(run: Run, config: ESM2Config, checkpoint: Checkpoint) -> Iterator[str]:
    try:
        found = load_snapshot(checkpoint.esm2_config)
    except ValueError as error:
        yield str(error)
        return
    difference = _first_difference(config.snapshot(), found.snapshot())
    if difference:
        key, was, now = difference
        yield f"{key} is {was} in the run, {now} in the checkpoint's row"
    if not CHECKPOINT_NAME.match(checkpoint.path):
        yield f"path {checkpoint.path!r} is no checkpoint's name"


def _audit_file(run: Run, checkpoint: Checkpoint) -> Iterator[Finding]:
    path = Path(run.output_folder) / checkpoint.path
    try:
        footer = read_footer(path)
    except ValueError as error:
        yield Finding(_of(checkpoint, str(error)), damaged=True, checkpoint=checkpoint)
        return
    expected = run_identity(run) | {
        "first_position": checkpoint.first_position,
        "stop_position": checkpoint.stop_position,
    }
    identity = footer.get("identity")
    found = dict(identity) if isinstance(identity, dict) else {}
    found |= {key: footer.get(key) for key in ("first_position", "stop_position")}
    difference = _first_difference(expected, found)
    if difference:
        key, was, now = difference
        fact = f"{key} is {was} in the database, {now} in the file's footer"
        yield Finding(_of(checkpoint, fact), damaged=False, checkpoint=checkpoint)
        return
    try:
        size, digest = path.stat().st_size, file_sha256(path)
    except OSError as error:
        yield Finding(_of(checkpoint, str(error.strerror)), damaged=True, checkpoint=checkpoint)
        return
    if (size, digest) != (checkpoint.bytes, checkpoint.sha256):
        fact = f"its bytes do not match their digest ({size} bytes, sha256 {digest})"
        yield Finding(_of(checkpoint, fact), damaged=True, checkpoint=checkpoint)


def _audit_leftovers(run: Run) -> Iterator[Finding]:
    """Find files under a checkpoint's name that another run made: resume removes only its own."""
    listed = {checkpoint.path for checkpoint in run.checkpoints}
    for path in leftovers(Path(run.output_folder), listed):
        try:
            identity = read_footer(path).get("identity")
        except ValueError:  # unfinished
            continue
        if isinstance(identity, dict) and identity.get("uuid") != run.uuid:
            fact = f"run {run.id}: {path.name}: made by run uuid {identity.get('uuid')}"
            yield Finding(fact, damaged=False)


def _of(checkpoint: Checkpoint, fact: str) -> str:
    return f"run {checkpoint.run_id}: {checkpoint.path}: {fact}"


def _place(detection: Detection) -> str:
    return str(detection.weights.path) if detection.weights else f"the catalog ({detection.name})"


def _first_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> tuple[str, str, str] | None:
    """Return (key, expected, found) of the first difference, in words; None if there is none."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        was, now = expected.get(key, "absent"), found.get(key, "absent")
        if isinstance(was, dict) and isinstance(now, dict):
            inner = _first_difference(was, now, f"{prefix}{key}.")
            if inner:
                return inner
        elif was != now or type(was) is not type(now):
            return f"{prefix}{key}", str(was), str(now)
    return None
