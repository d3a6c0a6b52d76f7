"""Display: detections, inputs, validations and runs as lines, table rows or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.catalog import shown_name
from lib.jobs.estimate import Estimate
from lib.jobs.loading import KnownModel
from lib.jobs.validation import RunAudit, Validation
from lib.ledger.attempts import AttemptFacts
from lib.ledger.ownership import shown_status
from lib.models.detection import Detection
from lib.models.download import Offer
from lib.models.released import Proof
from lib.sequences.inventory import Inventory
from lib.units import count, counted, duration, records, size
from schema.esm2_config import ESM2Config
from schema.tables import Run

__all__ = [
    "describe_audit",
    "describe_change",
    "describe_detection",
    "describe_estimate",
    "describe_input",
    "describe_proof",
    "describe_run",
    "describe_start",
    "describe_validation",
    "describe_weights",
    "detection_json",
    "run_json",
    "validation_json",
]


def describe_detection(
    detection: Detection, sha256: str | None = None, proof: Proof | None = None
) -> list[tuple[str, str, str]]:
    """Return (property, value, source) rows of a detected model.

    sha256: its digest, if it is known. proof: whether it is a released model; without one, what
    the sizes of its files tell.
    """
    proof = proof or detection.proof(sha256)
    name = shown_name(detection.name, proof.released if proof else None)
    rows = [("name", name, str(detection.weights.path) if detection.weights else "")]
    rows += [(key, _text(prop.value), prop.source) for key, prop in detection.properties.items()]
    if sha256 is not None:
        rows.append(("sha256", sha256, "file"))
        if detection.base_name is not None:
            rows.append(("base_sha256", detection.require_weights().unadapted.sha256(), "file"))
    if proof is not None:
        rows.append(("released", str(proof), proof.model or ""))
    if detection.untrained:
        rows.append(("untrained", "yes", "untrained weights: the vectors mean nothing"))
    return rows


def describe_weights(detection: Detection, offer: Offer | None) -> str:
    """Return one line with the model and where its weights are or will be downloaded from."""
    if offer is None:
        assert detection.weights is not None
        return f"model {detection.name}: {detection.weights.path}"
    much = f"size unknown ({offer.why_not})" if offer.size is None else size(offer.size)
    return (
        f"model {detection.name}: {offer.name} is not on disk, to download: {much} from "
        f"{offer.url} to {offer.target}"
    )


def describe_proof(config: ESM2Config) -> str:
    """Return one line with the digest of loaded weights, and whether they are a released model."""
    released = {True: "yes (by digest)", False: "no", None: "not known"}[config.released]
    name = shown_name(config.name, config.released)
    return f"model {name}: sha256 {config.sha256}, released: {released}"


def detection_json(detection: Detection, proof: Proof | None) -> dict[str, Any]:
    """Return a detection as JSON: the value and source of every property."""
    return {
        "name": detection.name,
        "path": str(detection.weights.path) if detection.weights else None,
        "untrained": detection.untrained,
        "released": None if proof is None else proof.released,
        "released_name": None if proof is None else proof.model,
        "released_by": None if proof is None else proof.by,
        "properties": {
            key: {"value": prop.value, "source": prop.source}
            for key, prop in detection.properties.items()
        },
    }


def describe_input(inventory: Inventory, max_residues: int) -> list[str]:
    """Return the findings of the preflight as lines, with every change made to a sequence."""
    return [
        f"input {inventory.name}: {records(inventory.records)}, "
        f"{counted(inventory.sequences, 'different sequence')}, "
        f"{count(inventory.residues)} residues to embed, longest {count(inventory.longest)}",
        *inventory.changes(max_residues),
    ]


def describe_start(model: KnownModel) -> str:
    """Return one line with the device, precision and pack size, and why each was chosen."""
    facts, (device_reason, precision_reason, pack_reason) = model.facts, model.reasons
    compiled = ", compiled" if model.settings.compute.compile else ""
    attention = f"; attention {facts.attention}" if facts.attention else ""
    return (
        f"device {facts.device} ({device_reason}): {facts.device_name}, {facts.threads} threads; "
        f"precision {model.settings.compute.precision} ({precision_reason}){compiled}; "
        f"{facts.tokens_per_pack} tokens per pack ({pack_reason}){attention}"
    )


def describe_change(run: Run, facts: AttemptFacts) -> str | None:
    """Return one line if an earlier attempt at a run computed attention in another way."""
    known = {attempt.versions.get("attention", "") for attempt in run.attempts}
    before = sorted(known - {"", facts.attention})
    if not facts.attention or not before:
        return None
    return f"attention was {before[-1]} before, is {facts.attention} now: last bits may differ"


def describe_run(run: Run) -> str:
    """Return one line with the status of a run and the folder of its output."""
    untrained = " (untrained weights)" if (run.esm2_config or {}).get("untrained") else ""
    copied = sum(_reused(run).values())
    reused = f" ({count(copied)} reused)" if copied else ""
    return (
        f"run {run.id} {run.status}: {records(run.records_total)}{reused} in "
        f"{counted(len(run.checkpoints), 'checkpoint')} in {run.output_folder}{untrained}"
    )


def run_json(run: Run) -> dict[str, Any]:
    """Return the result of a run as JSON."""
    return {
        "run": run.id,
        "label": run.label,
        "status": run.status,
        "model": run.esm2_config,
        "input": run.input_path,
        "inputs": [file.path for file in run.inputs],
        "records": run.records_total,
        "reused": _reused(run),
        "output_folder": run.output_folder,
        "checkpoints": [one.path for one in run.checkpoints],
    }


def _reused(run: Run) -> dict[int, int]:
    """Return how many records were copied from each earlier run."""
    copied: Counter[int] = Counter()
    for checkpoint in run.checkpoints:
        if checkpoint.reused_run_id is not None:
            copied[checkpoint.reused_run_id] += checkpoint.records
    return dict(sorted(copied.items()))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)


def describe_validation(validation: Validation) -> list[str]:
    """Return a successful validation as lines: model, input, unfinished runs."""
    config = validation.model.config
    untrained = " (untrained weights)" if config.untrained else ""
    lines = [
        f"model {shown_name(config.name, config.released)}{untrained}: {config.num_layers} layers, "
        f"hidden_dim {config.hidden_dim}, {config.parameters} parameters, sha256 {config.sha256}"
    ]
    if validation.inventory is not None:
        lines += describe_input(validation.inventory, validation.max_residues)
    if validation.estimate is not None:
        lines += describe_estimate(validation.estimate)
    for unfinished in validation.unfinished:
        reason = unfinished.reason
        verdict = "can be resumed with this model" if reason is None else f"cannot: {reason}"
        lines.append(f"unfinished run {unfinished.run_id}: {verdict}")
    if not validation.unfinished:
        lines.append("no unfinished run")
    return lines


def describe_estimate(estimate: Estimate) -> list[str]:
    """Return what a run would take as lines: time, disk and memory."""
    trial = estimate.trial
    gpu = f", {size(estimate.gpu_memory)} of the GPU's" if estimate.gpu_memory is not None else ""
    return [
        f"estimate for {records(estimate.records)}, {count(estimate.residues)} residues to embed:",
        f"  time    {duration(estimate.seconds)} on {estimate.device} (tried: "
        f"{count(trial.residues)} residues in {duration(trial.seconds)})",
        f"  disk    {size(estimate.disk)} ({size(estimate.disk_free)} free)",
        f"  memory  up to {size(estimate.memory)}{gpu}",
    ]


def validation_json(validation: Validation) -> dict[str, Any]:
    """Return a successful validation as JSON."""
    inventory = validation.inventory
    return {
        "model": validation.model.config.snapshot(),
        "input": None
        if inventory is None
        else {
            "path": inventory.files[0].source.name,
            "sha256": inventory.sha256,
            "files": [
                {
                    "path": file.source.name,
                    "sha256": file.sha256,
                    "records": file.records,
                }
                for file in inventory.files
            ],
            "records": inventory.records,
            "sequences": inventory.sequences,
            "residues": inventory.residues,
            "truncated": inventory.truncated,
            "nucleotide_like": inventory.nucleotide_like,
            "with_gaps": inventory.with_gaps,
        },
        "estimate": None if validation.estimate is None else asdict(validation.estimate),
        "unfinished": [
            {"run": one.run_id, "resumable": one.reason is None, "reason": one.reason}
            for one in validation.unfinished
        ],
    }


def describe_audit(audit: RunAudit) -> list[str]:
    """Return the audit of a run as lines: every problem, or one line that it is good."""
    run = audit.run
    if audit.facts:
        return audit.facts
    done = count(sum(one.records for one in run.checkpoints))
    status = shown_status(run.status, Path(run.output_folder))
    return [
        f"run {run.id} ({status}): identity good, "
        f"{counted(len(run.checkpoints), 'checkpoint')} with "
        f"{done} of {records(run.records_total)} good"
    ]
