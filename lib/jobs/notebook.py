"""Notebooks: sequences in memory, embedded as a run on record.

    from lib.jobs.notebook import embed

    run = embed({"one": "MKTAYIAKQR", "two": "MSHHWGYG"}, model="esm2_t33_650M_UR50D")
    run.ids, run.matrix()      # what open_run gives: lib.embeddings

It does what scripts/embed.py does, in the same order and with the same refusals. The sequences are
kept with the run as a FASTA file, as standard input is, so that it can be resumed and verified.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

from lib.catalog import shown_name
from lib.embeddings import RunEmbeddings, open_run
from lib.errors import InputError, SettingsError
from lib.jobs.computing import made_ready, ready_plan
from lib.jobs.embedding import Job, work
from lib.jobs.fetching import offer_of, with_weights
from lib.jobs.interruption import Interruption
from lib.jobs.reuse import may_reuse
from lib.ledger.database import open_for_writing
from lib.ledger.runs import checked_label, create_run
from lib.ledger.standard_input import copied_standard_input
from lib.models.detection import detect
from lib.sequences.inventory import preflight
from lib.settings import DEFAULT_CONFIG, load_settings
from lib.units import records, size
from schema.settings import STANDARD_INPUT

__all__ = ["embed"]

Proteins = Sequence[str] | Sequence[tuple[str, str]] | Mapping[str, str]


def embed(
    sequences: Proteins,
    *,
    model: str | Path | None = None,
    settings: Mapping[str, str | float | Path] = {},
    config: str | Path = DEFAULT_CONFIG,
    label: str | None = None,
    say: Callable[[str], None] = print,
) -> RunEmbeddings:
    """Embed sequences as a run on record, and open it.

    sequences: a list, whose ids are its positions; a list of (id, sequence), as fair-esm's batch
    converter takes it; or sequences by their id, as in a dictionary or a pandas Series, whose index
    has the ids (without blanks). model: a released name or a path, as
    MODEL=; settings: "section.option" to text, a number or a path, as --set. Both are laid over
    `config`, as a script does it. label: what history calls the run. What an earlier run embedded
    alike is copied from it. `say` is told which run it is, what was changed in the sequences and
    what it reuses. Ctrl-C commits what is finished and ends with an InterruptedRunError; resume.py
    continues the run.

    Returns the vectors in the order of `sequences`: `matrix()` is (N, hidden_dim) float32. Raises
    what the scripts print as one line: a LedgerError, as InputError for a letter that is not in
    the alphabet.
    """
    said = {name: _text(name, value) for name, value in settings.items()}
    said["input.fasta"] = STANDARD_INPUT
    if model is not None:
        said["model.esm_model"] = str(model)
    chosen = load_settings(Path(config), said)
    called = checked_label(label)
    fasta = io.BytesIO(_fasta(sequences))
    interruption = Interruption()
    # Python lets only the main thread handle signals.
    is_main = threading.current_thread() is threading.main_thread()
    with interruption.handled() if is_main else nullcontext(), ExitStack() as opened:
        detection = detect(chosen.model, contacts="contacts" in chosen.output.include)
        offer = offer_of(chosen, detection)
        if offer is not None:
            much = "size unknown" if offer.size is None else size(offer.size)
            say(f"{offer.name}: {much} from {offer.url} to {offer.target}")
        copy = copied_standard_input(chosen.input, Path(chosen.output.folder), fasta)
        inventory = preflight(chosen.input, opened.enter_context(copy), digests=chosen.output.reuse)
        for line in inventory.changes(chosen.input.max_residues):
            say(line)
        engine = opened.enter_context(open_for_writing(chosen.database.url, say=say))
        detection = with_weights(chosen, detection, lambda _: nullcontext(lambda *_: None))
        known, computer = opened.enter_context(
            made_ready(
                chosen, detection, None, interruption, say,
                later=may_reuse(engine, chosen, detection),
            )
        )  # fmt: skip
        reuse = ready_plan(engine, known, computer, inventory, say)
        with (
            interruption.deferred(),
            create_run(
                engine, known.settings, known.config, inventory, known.facts, reuse, called
            ) as ownership,
        ):
            number = ownership.run.id
            name = shown_name(known.config.name, known.config.released)
            untrained = " (untrained weights)" if known.config.untrained else ""
            say(f"run {number}: {records(inventory.records)} by {name}{untrained}")
            work(
                Job(
                    engine, ownership, known.settings, inventory, computer, interruption,
                    progress=lambda _: None, reuse=reuse, say=say,
                )
            )  # fmt: skip
    return open_run(chosen.database.url, number)


def _fasta(sequences: Proteins) -> bytes:
    """Return sequences as FASTA; raises InputError for what would become another record."""
    named = _named(sequences)
    if not named:
        raise InputError("sequences: there are none")
    lines = []
    for number, (name, sequence) in enumerate(named):
        if not isinstance(sequence, str):
            kind = type(sequence).__name__
            raise InputError(f"record {number} ({name}): its sequence is {kind}, not str")
        for what, text in (("id", str(name)), ("sequence", sequence)):
            if "\n" in text or "\r" in text:
                raise InputError(f"record {number}: a line break in its {what}")
        words = str(name).split()
        if words and words != [str(name)]:  # of a FASTA header, only the first word is the id
            raise InputError(f"record {number} ({name}): a blank in its id")
        lines.append(f">{name}\n{sequence}\n")
    return "".join(lines).encode("utf-8", "surrogatepass")


def _named(sequences: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 (anything may be given)
    """Return (id, sequence) pairs; raises InputError for what has no order or several columns."""
    if isinstance(sequences, str):
        raise InputError("sequences: one string, not a list of them")
    if isinstance(sequences, set | frozenset) or getattr(sequences, "ndim", 1) != 1:
        kind = type(sequences).__name__
        raise InputError(f"sequences: {kind}, not a list of them or sequences by their id")
    # A pandas Series is not a Mapping.
    if hasattr(sequences, "keys"):
        return [*sequences.items()]
    listed = [*sequences]
    are_pairs = all(isinstance(one, tuple) and len(one) == 2 for one in listed)
    return listed if are_pairs else [*enumerate(listed)]


def _text(name: str, value: object) -> str:
    """Return the value of an option as --set has it; raises SettingsError if it cannot be one."""
    if isinstance(value, str | Real | Path):
        return str(value)
    raise SettingsError(f"{name}: {type(value).__name__}, not text, a number or a path")
