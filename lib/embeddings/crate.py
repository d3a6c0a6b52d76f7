"""A Process Run Crate: a run with its provenance, in the form of RO-Crate (version 1.1).

https://w3id.org/ro/wfrun/process/0.5: an action for every execution of a program, here for every
attempt at the run, with the program, what it was given and the files that it made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from lib.embeddings.provenance import FACTS_FILE, computed_with, facts_text, facts_to_publish
from lib.embeddings.reading import RunEmbeddings
from lib.embeddings.selection import kept_columns, library
from lib.embeddings.verified import VerifiedFile
from lib.files import new_path
from lib.ledger.history import altered_rows, query
from lib.units import in_words
from schema.version import VERSION

__all__ = ["NO_LICENSE", "write_crate"]

# An entity of the crate; rocrate has no types.
Entity = Any

NO_LICENSE = "not stated"
_RO_CRATE = "1.1"
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_PROGRAM = "#esm-ledger"
# Terms that the context of RO-Crate 1.1 lacks: https://w3id.org/ro/terms/workflow-run
_TERMS = {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}
# What was said to the program and can change a vector, by the name of the run's fact.
_PARAMETERS = {
    "include": "what is kept of each record",
    "repr_layers": "layers that are kept (0 is the embedding)",
    "precision": "type of the matrix products",
    "compile": "whether what is between the products was compiled",
    "per_tok_dtype": "type of per_tok values",
    "max_residues": "residues above which a sequence is long",
    "long_sequences": "what is done with a long sequence",
    "unknown_residues": "what is done with letters that ESM-2 does not know",
    "duplicate_ids": "what is done with repeated ids",
}
_COMPLETED = "http://schema.org/CompletedActionStatus"
_FAILED = "http://schema.org/FailedActionStatus"


def write_crate(url: str, run: RunEmbeddings, to: Path, license: str) -> None:
    """Write a folder with a copy of every checkpoint file, run.json and ro-crate-metadata.json.

    url: the run database. license: an address, or words. Input and weights are described by name,
    size and digest; they are not copied. Raises IdentityRefusedError if a file is not the one that
    the database lists.
    """
    library("rocrate", "crate")
    with new_path(to, folder=True) as folder:
        facts = facts_to_publish(run, kept_columns(run))
        (folder / FACTS_FILE).write_text(facts_text(facts), encoding="utf-8")
        for file in run.files:
            file.copy(folder / file.listed.path.name)
        crate = _Crate(url, run, license)
        content = json.dumps(crate.content(), indent=2, ensure_ascii=False) + "\n"
        (folder / "ro-crate-metadata.json").write_text(content, encoding="utf-8")


class _Crate:
    """The entities of a crate, made by the library rocrate."""

    def __init__(self, url: str, run: RunEmbeddings, license: str) -> None:
        # Imported here, because it is an extra.
        from rocrate.model.contextentity import ContextEntity
        from rocrate.rocrate import ROCrate

        self._entity = ContextEntity
        self._url, self._run = url, run
        self._crate = ROCrate(version=_RO_CRATE)
        self._crate.metadata.extra_terms.update(_TERMS)
        self._describe(license)

    def content(self) -> dict[str, Any]:
        """Return the content of ro-crate-metadata.json."""
        content: dict[str, Any] = self._crate.metadata.generate()
        return content

    def _add(self, identifier: str, kind: str, **properties: object) -> Entity:
        known = {name: value for name, value in properties.items() if value is not None}
        return self._crate.add(self._entity(self._crate, identifier, {"@type": kind, **known}))

    def _describe(self, license: str) -> None:
        run, root = self._run, self._crate.root_dataset
        inputs = ", ".join(PurePath(one["path"]).name for one in run.inputs)
        untrained = (
            " Untrained weights: the vectors mean nothing." if run.model["untrained"] else ""
        )
        root["name"] = f"ESM-2 embeddings of {inputs} by {run.model['name']}"
        root["description"] = (
            f"Run {run.facts['uuid']} of esm-ledger: {len(run)} records as {_columns(run)}, in "
            f"Parquet files with a row per record.{untrained}"
        )
        is_address = license.startswith(("https://", "http://"))
        root["license"] = (
            self._add(license, "CreativeWork", name=license) if is_address else license
        )
        root["identifier"] = f"urn:uuid:{run.facts['uuid']}"
        root["conformsTo"] = self._add(
            _PROFILE, "CreativeWork", name="Process Run Crate", version="0.5"
        )
        self._crate.add_file(
            dest_path=FACTS_FILE,
            properties={"name": "the facts of the run", "encodingFormat": "application/json"},
        )
        root["mentions"] = _one_or_list(self._actions())

    def _actions(self) -> list[Entity]:
        """Add an action for each attempt, with what it was given and what it made."""
        given = [*self._inputs(), *self._weights(), *self._parameters()]
        number = self._run.facts["id"]
        attempts = query(
            self._url, "SELECT * FROM attempts WHERE run_id = ? ORDER BY id", [number]
        ).dictionaries()
        made = query(
            self._url,
            "SELECT attempt_id, path, uuid FROM checkpoints LEFT JOIN runs ON runs.id = "
            "reused_run_id WHERE run_id = ? ORDER BY first_position",
            [number],
        ).dictionaries()
        sources = {one["path"]: one["uuid"] for one in made}
        files = {}
        for file in self._run.files:
            name = file.listed.path.name
            files[name] = self._file(file, sources[name])
        program = self._program()
        with altered_rows(self._url):
            return [
                self._action(
                    attempt,
                    program,
                    given,
                    [files[one["path"]] for one in made if one["attempt_id"] == attempt["id"]],
                )
                for attempt in attempts
            ]

    def _action(
        self,
        attempt: Mapping[str, Any],
        program: Entity,
        given: list[Entity],
        made: list[Entity],
    ) -> Entity:
        # A record that was made anew does not know who computed; the files are whole.
        finished = attempt["outcome"] in ("finished", "rebuilt")
        action = self._add(
            f"#attempt-{attempt['id']}",
            "CreateAction",
            name=f"attempt {attempt['id']} at the run: {attempt['outcome']}",
            description=(
                f"On {attempt['device_name']} ({attempt['device']}), {attempt['threads']} threads, "
                f"{attempt['tokens_per_pack']} tokens per pack"
            ),
            startTime=_to_seconds(attempt["started_at"]),
            endTime=_to_seconds(attempt["ended_at"]),
            actionStatus=_COMPLETED if finished else _FAILED,
            error=None if finished else attempt["error"],
        )
        action["instrument"] = program
        action["object"] = given
        if made:
            action["result"] = _one_or_list(made)
        return action

    def _program(self) -> Entity:
        program = self._add(
            _PROGRAM,
            "SoftwareApplication",
            name="esm-ledger",
            softwareVersion=VERSION,
            description="ESM-2 embedding runs, on the record",
        )
        program["softwareRequirements"] = [
            self._add(
                _address(name),
                "SoftwareApplication",
                name=name,
                url=_address(name),
                softwareVersion=version,
            )
            for name, version in computed_with(self._run).items()
            if name != "attention"  # not a piece of software
        ]
        return program

    def _inputs(self) -> list[Entity]:
        return [
            self._add(
                f"#input-{one['number']}",
                "CreativeWork",
                name=PurePath(one["path"]).name,
                description=f"FASTA file with {one['records']} records; not part of the crate",
                size=str(one["bytes"]),
                sha256=one["sha256"],
            )
            for one in self._run.inputs
        ]

    def _weights(self) -> list[Entity]:
        model = self._run.model
        released = " Released ESM-2 model, by its SHA-256." if model.get("released") else ""
        weights = self._add(
            "#weights",
            "CreativeWork",
            name=model["name"],
            description=f"Weights of the model; not part of the crate.{released}",
            sha256=model["sha256"],
            encodingFormat=model["weights_format"],
        )
        if "base_name" in model:
            base = self._add(
                "#base", "CreativeWork", name=model["base_name"], sha256=model["base_sha256"]
            )
            weights["isBasedOn"] = base
        return [weights]

    def _parameters(self) -> list[Entity]:
        return [
            self._add(
                f"#{name}",
                "PropertyValue",
                name=name,
                value=_text(self._run.facts[name]),
                description=description,
            )
            for name, description in _PARAMETERS.items()
        ]

    def _file(self, file: VerifiedFile, source: str | None) -> Entity:
        """Add a checkpoint file; source: the UUID of the run that its vectors were copied from."""
        made = self._crate.add_file(
            dest_path=file.listed.path.name,
            properties={
                "name": "vectors, a row per record",
                "encodingFormat": "application/vnd.apache.parquet",
                "contentSize": str(file.listed.bytes),
                "sha256": file.listed.sha256,
            },
        )
        if source is not None:
            name = "an earlier run of the same model and precision"
            made["isBasedOn"] = self._add(f"urn:uuid:{source}", "CreativeWork", name=name)
        return made


def _one_or_list(entities: list[Entity]) -> Entity:
    """RO-Crate 1.1 wants a single value as it is, not as a list of one."""
    return entities[0] if len(entities) == 1 else entities


def _to_seconds(time: str | None) -> str | None:
    return None if time is None else datetime.fromisoformat(time).isoformat(timespec="seconds")


def _address(package: str) -> str:
    return (
        "https://www.python.org/" if package == "python" else f"https://pypi.org/project/{package}/"
    )


def _columns(run: RunEmbeddings) -> str:
    return " ".join(map(str, kept_columns(run)))


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return in_words(value)
