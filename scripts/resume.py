"""Continue an interrupted run with the very model, input and settings that made it.

    python scripts/resume.py
    python scripts/resume.py --run 12 --esm-model /new/place/esm2_t33_650M_UR50D.pt
    python scripts/resume.py --run 12 --recompute-damaged

Settings come from the run database, not from config.ini as it is today. --esm-model and --input
may say where the same weights and the same FASTA lie now. Exit status: 0 done, 2 nothing to
resume or weights not found, 3 identity refused, 4 disk, database or memory failed, 130 or 143
interrupted with the work so far committed.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

if __name__ == "__main__":  # a Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from lib.console.display import (
    describe_detection,
    describe_input,
    describe_run,
    describe_start,
    run_json,
)
from lib.console.output import (
    ResidueBar,
    arguments,
    database_url,
    note,
    overrides,
    print_result,
    print_table,
    run_script,
    settings_arguments,
)
from lib.jobs.admission import admit, clear_leftovers
from lib.jobs.embedding import Job, work
from lib.jobs.interruption import Interruption
from lib.jobs.loading import load_model
from lib.jobs.progress import Progress
from lib.ledger.database import open_for_writing
from lib.ledger.runs import find_run, load_run, own, start_attempt
from lib.network.device import packs_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Find the run, admit it, compute what is left."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=int, metavar="N", help="default: the newest unfinished run")
    parser.add_argument(
        "--recompute-damaged",
        action="store_true",
        help="compute again what lost or altered checkpoint files held",
    )
    settings_arguments(parser, "esm_model", "input")
    parsed = parser.parse_args(argv)
    said = overrides(parsed)
    interruption = Interruption()
    with (
        interruption.handled(),
        open_for_writing(database_url(parsed), create=False) as engine,
    ):
        run_id = find_run(engine, parsed.run).id
        with own(load_run(engine, run_id)):
            # ---- Identity: all of it, before a tensor is read
            run = load_run(engine, run_id)
            admission = admit(run, said, recompute_damaged=parsed.recompute_damaged)
            detection, settings = admission.detection, admission.settings
            columns = ["property", "value", "source"]
            print_table(columns, describe_detection(detection, admission.sha256), to_stderr=True)
            inventory = admission.inventory
            for line in describe_input(inventory, settings.input.max_residues):
                note(line)
            if run.status == "finished" and not admission.damaged:
                print_result(run_json(run), [describe_run(run)], as_json=parsed.json)
                return 0
            model = load_model(settings, detection, admission.sha256)
            note(describe_start(model))

            # ---- Back on the record
            with (
                interruption.deferred(),
                start_attempt(engine, run_id, model.facts, admission.damaged) as ownership,
            ):
                for checkpoint in admission.damaged:
                    note(f"run {run_id}: {checkpoint.path}: dropped, to be computed again")
                run = load_run(engine, run_id)
                for path in clear_leftovers(run):
                    note(f"run {run_id}: {path.name}: not in the database, removed")
                network = model.network
                done = [range(one.first_position, one.stop_position) for one in run.checkpoints]
                at_once = packs_at_once(network.device)
                counted = Progress(inventory.lengths, network.shape.hidden_dim, done, at_once)
                with ResidueBar(counted) as bar:
                    progress = bar.advance
                    run = work(
                        Job(engine, ownership, settings, inventory, network, interruption, progress)
                    )
    print_result(run_json(run), [describe_run(run)], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
