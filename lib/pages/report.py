"""Report: one run as a self-contained page of HTML."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib.catalog import shown_name
from lib.embeddings.reading import open_run, run_facts
from lib.errors import IdentityRefusedError
from lib.files import disk_errors, new_path, refuse_existing
from lib.ledger.history import RunDetail, Table, query, run_detail
from lib.ledger.overview import attempts_table, inputs_table, run_fields, workers_table
from lib.ledger.sqlite_file import database_path
from lib.ledger.workers import NO_WORKER
from lib.pages.figures import (
    Figure,
    Work,
    lengths_figure,
    norms_figure,
    projection_figure,
    short_id,
    throughput_figure,
)
from lib.pages.multiqc import PRUNED, is_own, multiqc_path, multiqc_text, summary
from lib.pages.survey import Survey, survey
from lib.units import count, moment, printable, records
from schema.esm2_config import ESM2Config, load_snapshot
from schema.version import VERSION

__all__ = ["Report", "default_place", "make_report", "write_report"]

_ATTEMPTS_SHOWN = 20
_INPUTS_SHOWN = 100
_SEAL = re.compile(rb"<!-- esm-ledger: end of the report, sha256 ([0-9a-f]{64}) -->\n\Z")
_SEAL_BYTES = 120


@dataclass(frozen=True)
class Report:
    """The content of a report.

    pruned: whether the files of the run were.
    model: its name, with (untrained) if it is. summary: its row for MultiQC. facts: of the run.
    properties: of the model.
    inputs: the input files, if there are several.
    """

    run: int
    uuid: str
    pruned: bool
    status: str
    model: str
    input_name: str
    written: str
    warnings: list[str]
    summary: dict[str, Any]
    facts: dict[str, str | None]
    properties: dict[str, str | None]
    figures: list[Figure]
    extremes: Table
    inputs: Table
    inputs_left_out: int
    attempts: Table
    attempts_left_out: int
    workers: Table
    workers_left_out: int


def default_place(url: str, report: Report) -> Path:
    """Return the default path of a report: in reports/ beside the run database.

    That of a pruned run has a name of its own: an earlier one shows what nobody can draw again.
    """
    name = f"run-{report.run:06d}{PRUNED if report.pruned else ''}.html"
    return database_path(url).parent / "reports" / name


def make_report(url: str, run_id: int, written: str, output: Path | None = None) -> Report:
    """Read a run, finished or not, and its checkpoint files, unless they were pruned.

    written: the current time, UTC ISO 8601. output: as for `open_run`. Raises what `open_run` and
    `survey` raise, and IdentityRefusedError for incomplete model metadata.
    """
    detail = run_detail(url, run_id)
    line = detail.run.dictionaries()[0]
    run = None if line["pruned"] else open_run(url, run_id, partial=True, output=output)
    facts = run_facts(url, run_id) | {"output_folder": line["output"]} if run is None else run.facts
    try:
        model = load_snapshot(facts["esm2_config"])
    except ValueError as error:
        raise IdentityRefusedError(f"run {run_id}: {error}") from None
    found = None if run is None else survey(run)
    attempts = query(
        url,
        "SELECT device_name, versions FROM attempts WHERE run_id = ? ORDER BY id",
        [run_id],
    ).dictionaries()
    checkpoints = sorted(detail.checkpoints.dictionaries(), key=lambda one: one["checkpoint"])
    work = [
        Work(one["attempt"], one["residues"], one["seconds"])
        for one in checkpoints
        if one["reused_run"] is None
    ]
    done = line["records_done"] if run is None else len(run)
    warnings = _warnings(facts, done, found, detail, attempts)
    table, inputs = attempts_table(detail), inputs_table(detail)
    several = inputs.rows if len(inputs.rows) > 1 else []
    workers = workers_table(detail)
    return Report(
        run=run_id,
        uuid=facts["uuid"],
        pruned=run is None,
        status=line["status"],
        model=line["model"],
        input_name=PurePath(line["input"]).name,
        written=moment(written),
        warnings=warnings,
        summary=summary(line, facts["precision"], len(warnings)),
        facts=_facts(facts, detail),
        properties=_properties(model, detail.attempts.dictionaries()),
        figures=[
            lengths_figure(found, facts["max_residues"]),
            throughput_figure(work),
            projection_figure(found),
            norms_figure(found),
        ],
        extremes=_extremes(found),
        inputs=Table(inputs.columns, several[:_INPUTS_SHOWN]),
        inputs_left_out=max(0, len(several) - _INPUTS_SHOWN),
        attempts=Table(table.columns, table.rows[-_ATTEMPTS_SHOWN:]),
        attempts_left_out=max(0, len(table.rows) - _ATTEMPTS_SHOWN),
        workers=Table(workers.columns, workers.rows[-_ATTEMPTS_SHOWN:]),
        workers_left_out=max(0, len(workers.rows) - _ATTEMPTS_SHOWN),
    )


def write_report(report: Report, to: Path) -> None:
    """Write a report as HTML, and beside it its row for MultiQC.

    They replace only unaltered earlier ones of the same run, and a report of a pruned run none that
    was written before.
    """
    page = _page(report).encode()
    seal = f"<!-- esm-ledger: end of the report, sha256 {_digest(report, page)} -->\n"
    sample = f"run {report.run}: {report.input_name}"
    row = multiqc_text(sample, report.uuid, report.summary)
    files = [
        (to, page + seal.encode(), lambda path: _is_own(report, path)),
        (multiqc_path(to), row.encode(), lambda path: is_own(path, report.uuid)),
    ]
    for path, _, replaceable in files:
        refuse_existing(path, replaceable)
    for path, content, replaceable in files:
        with new_path(path, folder=False, replaceable=replaceable) as temporary:
            temporary.write_bytes(content)


def _page(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawings = [Markup(figure.svg) for figure in report.figures]
    legends = [[(Markup(svg), name) for svg, name in one.legend] for one in report.figures]
    return environment.get_template("report.html").render(
        report=report,
        figures=list(zip(report.figures, drawings, legends, strict=True)),
        version=VERSION,
    )


def _digest(report: Report, page: bytes) -> str:
    what = report.uuid + (PRUNED if report.pruned else "")
    return hashlib.sha256(what.encode() + b"\n" + page).hexdigest()


def _is_own(report: Report, path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with disk_errors(path), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SEAL_BYTES))
        seal = _SEAL.search(file.read())
        if seal is None:
            return False
        file.seek(0)
        page = file.read()[: -len(seal[0])]
    return _digest(report, page).encode() == seal[1]


def _shown(value: object) -> object:
    """Return the text of a value on the page; None becomes empty."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else printable(str(value))


def _facts(kept: Mapping[str, Any], detail: RunDetail) -> dict[str, str | None]:
    return run_fields(detail) | {
        "output": kept["output_folder"],
        "long sequences": f"{kept['long_sequences']} (more than {count(kept['max_residues'])})",
        "different sequences": count(kept["sequences_total"]),
        "input SHA-256": kept["input_sha256"],
        "run UUID": kept["uuid"],
    }


def _properties(model: ESM2Config, attempts: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    return {
        "name": shown_name(model.name, model.released),
        "released": {True: "yes", False: "no", None: None}[model.released],
        "layers": count(model.num_layers),
        "width of a vector": count(model.hidden_dim),
        "attention heads": count(model.attention_heads),
        "token dropout": "yes" if model.token_dropout else "no",
        "parameters": count(model.parameters),
        "untrained": "yes" if model.untrained else "no",
        "format": model.weights_format,
        "stored as": model.dtype,
        "SHA-256": model.sha256,
        "read from": attempts[-1]["weights_path"] if attempts else None,
    }


def _warnings(
    kept: Mapping[str, Any],
    done: int,
    found: Survey | None,
    detail: RunDetail,
    attempts: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Return the facts that somebody must know before using the vectors.

    kept: the row of the run; done: its records that were embedded; found: None if its files were
    pruned.
    """
    told, model = [], kept["esm2_config"]
    if kept["pruned_at"] is not None:
        told.append(
            f"Its files were pruned on {moment(kept['pruned_at'])} UTC: no vector is left. "
            f"{count(done)} of {records(kept['records_total'])} were embedded ({kept['status']})."
        )
    if model["untrained"]:
        told.append("Untrained weights: the vectors mean nothing.")
    name, released = model["name"], model.get("released")
    if shown_name(name, released) != name:
        told.append(f"The weights have the name {name} and are not the released file.")
    status = detail.run.dictionaries()[0]["status"]
    if status not in ("finished", "pruned"):
        told.append(f"Status {status}: {count(done)} of {records(kept['records_total'])} embedded.")
    if kept["records_truncated"]:
        told.append(
            f"{count(kept['records_truncated'])} of {records(kept['records_total'])} truncated to "
            f"{count(kept['max_residues'])} residues."
        )
    if kept["residues_mapped"]:
        told.append(f"Letters unknown to ESM-2 and read as X: {count(kept['residues_mapped'])}.")
    if kept["records_nucleotide_like"]:
        number = records(kept["records_nucleotide_like"])
        told.append(f"Only letters of ACGTUN, as nucleotides have: {number}.")
    if kept["records_with_gaps"]:
        told.append(f"Gaps (- or .), as an alignment has: {records(kept['records_with_gaps'])}.")
    if found is not None and found.repeated_ids:
        told.append(f"{records(found.repeated_ids)} with the id of an earlier one.")
    if kept["sequences_total"] < kept["records_total"]:
        same = kept["records_total"] - kept["sequences_total"]
        told.append(f"{records(same)} with the sequence of an earlier one, and so its vector.")
    problems = [one["problem"] for one in detail.checkpoints.dictionaries() if one["problem"]]
    if problems:
        told.append(f"Checkpoints with a problem: {count(len(problems))}; {problems[0]}.")
    for name, values in {
        "devices": [one["device_name"] for one in attempts if one["device_name"] != NO_WORKER],
        "library versions": [_versions(one["versions"]) for one in attempts],
    }.items():
        different = list(dict.fromkeys(values))
        if len(different) > 1:
            told.append(f"Attempts differ in {name}: {'; '.join(different)}.")
    computed = [one for one in detail.workers.dictionaries() if one["checkpoints"]]
    devices = list(dict.fromkeys(one["device_name"] for one in computed))
    if len(devices) > 1:
        told.append(f"Workers differ in devices: {'; '.join(devices)}.")
    return told


def _versions(text: str) -> str:
    return ", ".join(f"{name} {number}" for name, number in json.loads(text).items()) or "unknown"


def _extremes(found: Survey | None) -> Table:
    if found is None:
        return Table([], [])
    named = [("smallest", one) for one in found.smallest]
    named += [("largest", one) for one in found.largest]
    rows = [(which, f"{one.norm:.4g}", one.record, short_id(one.id)) for which, one in named]
    return Table(["which", "norm", "record", "id"], rows)
