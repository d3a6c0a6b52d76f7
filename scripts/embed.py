"""Embed FASTA files with ESM-2, as a run on the record.

    python scripts/embed.py --esm-model esm2_t33_650M_UR50D --input proteins.fasta
    python scripts/embed.py --input proteins.fasta --include mean bos --repr-layers 0 18 -1
    python scripts/embed.py --input a.fasta b.fasta.gz folder_of_fasta
    zcat proteins.fasta.gz | python scripts/embed.py --input -
    python scripts/embed.py --input proteins.fasta --label "phages, first try"
    python scripts/embed.py --input examples/proteins.fasta --validate-config

Several files are one input, whose records count from the first file on. Standard input is kept in
the folder of the run. What an earlier run embedded with the same model, precision, compile and
long_sequences is copied from it, unless --no-reuse is given.

What is finished is committed every [output] checkpoint_seconds or checkpoint_records; an
interrupted run is continued by resume.py. Exit status: 0 done, 2 settings, input or weights
refused, 3 identity refused, 4 disk, database, memory or network failed, 130, 143 or 129 interrupted
with the work so far committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, overrides, settings_arguments
from lib.console.bars import download_bar
from lib.console.display import (
    describe_proof,
    describe_start,
    describe_validation,
    describe_weights,
    validation_json,
)
from lib.console.embedding import (
    embed_new_run,
    refuse_missing_input,
    show_input,
    show_model,
    show_result,
)
from lib.console.output import note, print_result
from lib.console.program import run_script
from lib.jobs.computing import made_ready
from lib.jobs.fetching import offer_of, with_weights
from lib.jobs.interruption import Interruption
from lib.jobs.reuse import may_reuse
from lib.jobs.validation import validate
from lib.ledger.database import open_for_writing
from lib.ledger.runs import checked_label
from lib.ledger.sqlite_file import database_path, refuse_unwritable
from lib.ledger.standard_input import copied_standard_input, standard_input_for_now
from lib.models.detection import detect
from lib.sequences.inventory import preflight
from lib.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Detect, preflight, record, embed."""
    parser = arguments(__doc__)
    settings_arguments(
        parser, "esm_model", "input", "output", "include", "repr_layers", "reuse", "ray"
    )
    parser.add_argument("--label", metavar="TEXT", help="what history calls the run")
    parser.add_argument(
        "--validate-config", action="store_true", help="check all that validate.py does, and stop"
    )
    parsed = parser.parse_args(argv)
    interruption = Interruption()
    with interruption.handled(), ExitStack() as opened:
        settings = load_settings(parsed.config, overrides(parsed))
        if parsed.validate_config:
            with standard_input_for_now(settings.input) as standard_input:
                validation = validate(settings, note, standard_input)
            content, lines = validation_json(validation), describe_validation(validation)
            print_result(content, lines, as_json=parsed.json)
            return 0

        # ---- What will be done: detected, checked, displayed
        refuse_missing_input(settings)
        refuse_unwritable(database_path(settings.database.url))
        label = checked_label(parsed.label)
        detection = detect(settings.model, contacts="contacts" in settings.output.include)
        note(describe_weights(detection, offer_of(settings, detection)))
        show_model(detection)
        standard_input = opened.enter_context(
            copied_standard_input(settings.input, Path(settings.output.folder))
        )
        inventory = preflight(settings.input, standard_input, digests=settings.output.reuse)
        show_input(inventory, settings)
        engine = opened.enter_context(open_for_writing(settings.database.url, say=note))
        detection = with_weights(settings, detection, download_bar)
        model, computer = opened.enter_context(
            made_ready(
                settings,
                detection,
                None,
                interruption,
                note,
                later=may_reuse(engine, settings, detection),
            )
        )
        note(describe_proof(model.config))
        note(describe_start(model))

        # ---- On the record
        run = embed_new_run(engine, model, computer, inventory, interruption, label=label)
    show_result(run, as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
