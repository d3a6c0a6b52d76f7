"""Workers on the record: who computed for an attempt, with which weights, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import Engine, update

from lib.ledger.database import transaction, utc_now
from schema.tables import Attempt, Worker

__all__ = ["NO_WORKER", "WorkerFacts", "add_worker", "end_worker", "name_device", "see_workers"]

# The device of an attempt on a cluster that has started no worker, for it computes nothing.
NO_WORKER = "no worker"


@dataclass(frozen=True)
class WorkerFacts:
    """What is recorded of a worker; None: it was refused before that was known."""

    host: str
    pid: int
    node: str
    versions: Mapping[str, str]
    device: str | None = None
    device_name: str | None = None
    threads: int | None = None
    weights_path: str | None = None
    weights_sha256: str | None = None


def add_worker(
    engine: Engine,
    attempt_id: int,
    facts: WorkerFacts,
    started_at: str,
    outcome: str | None = None,
    error: str | None = None,
) -> int:
    """Record a worker; returns its number. outcome, error: if it has ended already."""
    with transaction(engine) as session:
        row = Worker(
            attempt_id=attempt_id,
            **asdict(facts),
            started_at=started_at,
            seen_at=utc_now(),
            outcome=outcome,
            error=error,
        )
        session.add(row)
        session.flush()
        return row.id


def name_device(engine: Engine, attempt_id: int, name: str, threads: int) -> None:
    """Record what an attempt computes with, if it was begun without a worker."""
    with transaction(engine) as session:
        session.execute(
            update(Attempt)
            .where(Attempt.id == attempt_id, Attempt.device_name == NO_WORKER)
            .values(device_name=name, threads=threads)
        )


def see_workers(engine: Engine, seen: Mapping[int, str]) -> None:
    """Record when workers, by their numbers, last answered (UTC ISO 8601)."""
    if not seen:
        return
    with transaction(engine) as session:
        for number, at in seen.items():
            later = (Worker.id == number) & (Worker.seen_at < at)
            session.execute(update(Worker).where(later).values(seen_at=at))


def end_worker(engine: Engine, worker_id: int, outcome: str, error: str | None = None) -> None:
    """Record how a worker ended: finished, refused or lost; only the first counts."""
    with transaction(engine) as session:
        session.execute(
            update(Worker)
            .where(Worker.id == worker_id, Worker.outcome.is_(None))
            .values(outcome=outcome, error=error)
        )
