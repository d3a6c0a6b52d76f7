"""Continue an interrupted run with the very model, input and settings that made it.

    python scripts/resume.py
    python scripts/resume.py --run 12 --esm-model /new/place/esm2_t33_650M_UR50D.pt
    python scripts/resume.py --run 12 --recompute-damaged

Settings come from the run database, not from config.ini as it is today, but for [cluster]: where
the work is done may change. --esm-model, --input and --output may say where the same weights, the
same FASTA and the run's folder lie now, which the record has then; - stands for the standard input
that was kept. Exit status: 0 done, 2 nothing to resume or weights not found, 3 identity refused, 4
disk, database or memory failed, 130, 143 or 129 interrupted with the work so far committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import (
    arguments,
    cluster_settings,
    database_url,
    folder_argument,
    folder_of_run,
    overrides,
    run_number,
    settings_arguments,
)
from lib.console.display import describe_change, describe_start
from lib.console.embedding import embed_under_bar, show_input, show_model, show_result
from lib.console.output import note
from lib.console.program import run_script
from lib.jobs.admission import admit
from lib.jobs.adoption import adopt_leftovers, drop_files
from lib.jobs.computing import made_ready
from lib.jobs.embedding import computes
from lib.jobs.interruption import Interruption
from lib.jobs.reuse import describe_reuse
from lib.ledger.database import open_for_writing
from lib.ledger.runs import own, start_attempt


def main(argv: Sequence[str] | None = None) -> int:
    """Find the run, admit it, compute what is left."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--run", type=run_number, metavar="N", help="default: the newest unfinished run"
    )
    parser.add_argument(
        "--recompute-damaged",
        action="store_true",
        help="compute again what lost or altered checkpoint files held, or a lost folder",
    )
    folder_argument(parser)
    settings_arguments(parser, "esm_model", "input", "ray")
    parsed = parser.parse_args(argv)
    said = overrides(parsed)
    interruption = Interruption()
    with (
        interruption.handled(),
        open_for_writing(database_url(parsed), create=False, say=note) as engine,
        own(engine, parsed.run, folder_of_run(parsed), make_folder=parsed.recompute_damaged) as run,
        ExitStack() as opened,
    ):
        # ---- Identity: all of it, before a tensor is read
        admission = admit(run, said, recompute_damaged=parsed.recompute_damaged)
        inventory, damaged = admission.inventory, admission.damaged
        show_model(admission.detection, admission.sha256)
        show_input(inventory, admission.settings)
        if admission.reuse is not None:
            note(describe_reuse(admission.reuse, inventory))
        if run.status == "finished" and not damaged and not admission.missing:
            show_result(run, as_json=parsed.json)
            return 0
        settings = replace(admission.settings, cluster=cluster_settings(parsed))
        later = not computes(run, admission.reuse, damaged)
        model, computer = opened.enter_context(
            made_ready(
                settings, admission.detection, admission.sha256, interruption, note, later=later
            )
        )
        note(describe_start(model))
        if change := describe_change(run, model.facts):
            note(change)

        # ---- Back on the record
        for line in drop_files(run, damaged):
            note(line)
        with (
            interruption.deferred(),
            start_attempt(engine, run, model.facts, inventory, damaged) as ownership,
        ):
            rules = model.settings.input
            for line in adopt_leftovers(engine, ownership, rules, inventory, admission.reuse):
                note(line)
            embed_under_bar(
                engine, ownership, model, computer, inventory, admission.reuse, interruption
            )
    show_result(run, as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
