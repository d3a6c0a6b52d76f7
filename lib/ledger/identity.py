"""Identity: a run, its checkpoints, the weights and the input in hand belong together, or stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lib.errors import IdentityRefusedError
from lib.ledger.footer import is_compiled
from lib.sequences.inputs import named
from lib.sequences.inventory import Inventory
from lib.sequences.plan import PLAN
from lib.settings import Settings
from schema.esm2_config import ESM2Config, load_snapshot
from schema.parquet import checkpoint_columns
from schema.tables import Run

__all__ = [
    "check_digests",
    "check_input",
    "check_properties",
    "check_regression",
    "check_settings",
    "check_sha256",
    "first_difference",
    "identity_in_footer",
    "identity_on_record",
    "run_columns",
    "run_config",
    "run_identity",
    "settings_identity",
]


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
        # Without a plan of reuse there is no such key, as in footers older than it.
        **({} if run.reuse_sha256 is None else {"reuse_sha256": run.reuse_sha256}),
    }


def run_config(run: Run) -> ESM2Config:
    """Return the model of a run; raises IdentityRefusedError if its metadata is not whole."""
    try:
        return load_snapshot(run.esm2_config)
    except ValueError as error:
        raise IdentityRefusedError(f"run {run.id}: {error}") from None


def run_columns(run: Run) -> pa.Schema:
    """Return the columns of a run's checkpoint files."""
    width = run_config(run).hidden_dim
    return checkpoint_columns(
        run.include, run.repr_layers, width, run.per_tok_dtype, digests=bool(run.has_digests)
    )


def check_properties(run: Run, found: Mapping[str, object], place: str) -> None:
    """Compare a run's model with detected properties, before a digest is taken.

    found: values by their key in the snapshot, as many as are known; place: where they were found.
    Raises IdentityRefusedError at the first difference.
    """
    expected = run_config(run).snapshot()
    difference = first_difference({key: expected[key] for key in found}, found)
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(f"run {run.id}: {key} is {was} in the run, {now} in {place}")


def check_sha256(run: Run, sha256: str, place: str) -> None:
    """Compare the digest of the weights in hand, which lie at `place`, with the run's.

    Raises IdentityRefusedError if they are other weights, perhaps of the same shape.
    """
    expected = run_config(run).sha256
    if sha256 != expected:
        raise IdentityRefusedError(
            f"run {run.id}: sha256 of the weights is {expected} in the run, {sha256} in {place}"
        )


def check_regression(run: Run, sha256: str, path: Path) -> None:
    """Compare the digest of the contact regression in hand with the run's.

    Raises IdentityRefusedError if it is another one.
    """
    expected = run_config(run).contact_regression_sha256
    if sha256 != expected:
        raise IdentityRefusedError(
            f"run {run.id}: sha256 of the contact regression is {expected} in the run, "
            f"{sha256} in {path}"
        )


def check_input(run: Run, inventory: Inventory) -> None:
    """Compare the FASTA in hand with the run's; raises IdentityRefusedError if it changed."""
    check_digests(run, [(file.source.name, file.sha256) for file in inventory.files])
    expected = {
        "sha256": run.input_sha256,
        "records": run.records_total,
        "sequences": run.sequences_total,
        "residues": run.residues_total,
    }
    difference = first_difference(expected, {key: getattr(inventory, key) for key in expected})
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"run {run.id}: {key} of the input is {was} in the run, {now} in {inventory.name}"
        )


def check_digests(run: Run, digests: Sequence[tuple[str, str]]) -> None:
    """Compare the digests of input files with those of a run, in their order.

    digests: (name, SHA-256) of each file. Raises IdentityRefusedError at the first difference.
    """
    if len(digests) != len(run.inputs):
        raise IdentityRefusedError(
            f"run {run.id}: {len(run.inputs)} files in the input of the run, {len(digests)} in "
            f"{named([name for name, _ in digests])}"
        )
    for file, (name, sha256) in zip(run.inputs, digests, strict=True):
        if sha256 != file.sha256:
            which = "the input" if len(digests) == 1 else f"input file {file.number}"
            raise IdentityRefusedError(
                f"run {run.id}: sha256 of {which} is {file.sha256} in the run, {sha256} in {name}"
            )


def check_settings(run: Run, settings: Settings) -> None:
    """Compare a run's columns with the settings it is to continue with.

    Raises IdentityRefusedError at the first difference, and for a plan of another version.
    """
    expected = identity_on_record(run)
    wanted = settings_identity(settings) | {"compile": settings.compute.compile}
    difference = first_difference({key: expected[key] for key in wanted}, wanted)
    if difference:
        key, was, now = difference
        raise IdentityRefusedError(
            f"run {run.id}: {key} is {was} in the run, {now} in its settings"
        )
    if run.plan != PLAN:
        raise IdentityRefusedError(
            f"run {run.id}: plan is {run.plan!r}, this program's is {PLAN!r}"
        )


def identity_on_record(run: Run) -> dict[str, Any]:
    """Return what identifies a run, and what its settings on record say of how it is computed."""
    return run_identity(run) | {"compile": is_compiled(run.settings)}


def identity_in_footer(footer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same as a checkpoint's footer has it."""
    identity = footer.get("identity")
    found = dict(identity) if isinstance(identity, dict) else {}
    return found | {"compile": is_compiled(footer.get("settings"))}


def first_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> tuple[str, str, str] | None:
    """Return (key, expected, found) of the first difference, in words; None if there is none."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        was, now = expected.get(key, "absent"), found.get(key, "absent")
        if isinstance(was, dict) and isinstance(now, dict):
            inner = first_difference(was, now, f"{prefix}{key}.")
            if inner:
                return inner
        elif was != now or type(was) is not type(now):
            return f"{prefix}{key}", str(was), str(now)
    return None
