"""Sources: the earlier runs of a database whose vectors a new run may copy.

Vectors of the same residues are the same if model, token dropout, heads, precision, compilation and
the rule for long sequences are, and with contacts the contact regression. Rows of a run that do not
belong together are no sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import ColumnElement, Engine, select

from lib.errors import IdentityRefusedError
from lib.ledger.audit import audit
from lib.ledger.database import transaction
from lib.ledger.footer import is_compiled
from lib.ledger.identity import run_config
from lib.ledger.runs import load_run
from lib.settings import Settings
from schema.esm2_config import ESM2Config
from schema.parquet import CONTACTS, vector_columns
from schema.tables import Checkpoint, Model, Run

__all__ = ["SourceRun", "Wanted", "has_sources", "source_runs"]


_HAS_FILES = (
    Run.pruned_at.is_(None),
    select(Checkpoint.id).where(Checkpoint.run_id == Run.id).exists(),
)


@dataclass(frozen=True)
class Wanted:
    """What a run has to have for its vectors to be copied into a new one."""

    config: ESM2Config
    settings: Settings

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """What the rows of a run and of its model have to say, for a query of both."""
        return [
            Model.sha256 == self.config.sha256,
            Model.token_dropout == self.config.token_dropout,
            Model.attention_heads == self.config.attention_heads,
            Run.precision == self.settings.compute.precision,
            Run.long_sequences == self.settings.input.long_sequences,
        ]

    def is_kept_by(self, run: Run) -> bool:
        """Return whether a run of the same model kept every column, in a type that serves.

        A compiled network rounds differently: neither kind of run serves the other.
        """
        if is_compiled(run.settings) != self.settings.compute.compile:
            return False
        include = self.settings.output.include
        kept = vector_columns(run.include, run.repr_layers)
        if not {*vector_columns(include, self.config.repr_layers)} <= {*kept}:
            return False
        if CONTACTS in include:
            regression = run_config(run).contact_regression_sha256
            if regression != self.config.contact_regression_sha256:
                return False
        # float32 is rounded to float16; the other way, bits would be missing.
        serving = (self.settings.output.per_tok_dtype, "float32")
        return "per_tok" not in include or run.per_tok_dtype in serving


class SourceRun(NamedTuple):
    """A run, the checkpoints of it that can be copied from, and what is wrong with its rows.

    run: None if it cannot be read.
    """

    run: Run | None
    checkpoints: Sequence[Checkpoint]
    faults: Sequence[str]


def has_sources(engine: Engine, settings: Settings, shape: Mapping[str, int | bool]) -> bool:
    """Return whether there is any run with checkpoints of a model of the same shape.

    shape: columns of `models`. Raises MachineError if the database fails.
    """
    query = (
        select(Run.id)
        .join(Model, Run.model_id == Model.id)
        .filter_by(**shape)
        .where(Run.long_sequences == settings.input.long_sequences, *_HAS_FILES)
    )
    with transaction(engine) as session:
        return session.scalar(query.limit(1)) is not None


def source_runs(engine: Engine, wanted: Wanted) -> Iterator[SourceRun]:
    """Yield the runs that keep what is wanted, newest first.

    Those without the digests of their sequences, as of version 1, are among them. Raises
    MachineError if the database fails.
    """
    for run_id in _runs_of_model(engine, wanted):
        try:
            run = load_run(engine, run_id)
            findings = list(audit(run, files=False))
            if not wanted.is_kept_by(run):
                continue
        except IdentityRefusedError as error:
            yield SourceRun(None, [], [str(error)])
        except (TypeError, ValueError) as error:  # JSON of another shape than ours
            yield SourceRun(None, [], [f"run {run_id}: malformed rows: {error}"])
        else:
            wrong = [finding.checkpoint for finding in findings]
            checkpoints = [one for one in run.checkpoints if one not in wrong and None not in wrong]
            yield SourceRun(run, checkpoints, [finding.fact for finding in findings])


def _runs_of_model(engine: Engine, wanted: Wanted) -> list[int]:
    """Return the runs with checkpoints of the same model, precision and rule, newest first."""
    query = (
        select(Run.id)
        .join(Model, Run.model_id == Model.id)
        .where(*wanted.conditions, *_HAS_FILES)
        .order_by(Run.id.desc())
    )
    with transaction(engine) as session:
        return list(session.scalars(query))
