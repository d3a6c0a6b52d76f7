"""Validate settings, model, input and database before work starts, without changing anything.

    python scripts/validate.py --esm-model esm2_t33_650M_UR50D --input proteins.fasta
    python scripts/validate.py --run 12
    python scripts/validate.py --run 12 --output /new/place/embeddings

With --run it audits every checkpoint of the run, compares the given weights and input with it, and
tries the model; --output then says where the run's folder lies now. Without, it tries the model,
checks the input if there is one, and lists every unfinished run and whether this model can continue
it. Exit status: 0 good, 2 settings, input or weights refused, 3 identity refused, 4 environment
failed, 130, 143 or 129 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import (
    arguments,
    database_url,
    given_path,
    overrides,
    run_number,
    settings_arguments,
)
from lib.console.display import describe_audit, describe_validation, validation_json
from lib.console.output import note, print_result
from lib.console.program import run_script
from lib.jobs.interruption import Interruption
from lib.jobs.validation import audit_run, try_run, validate
from lib.ledger.standard_input import standard_input_for_now
from lib.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Validate a run, or the model and input of a future run."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, metavar="N", help="audit this run")
    settings_arguments(parser, "esm_model", "input", "output", "include", "repr_layers")
    parsed = parser.parse_args(argv)
    said = overrides(parsed)
    with Interruption().handled():
        if parsed.run is None:
            settings = load_settings(parsed.config, said)
            with standard_input_for_now(settings.input) as standard_input:
                validation = validate(settings, note, standard_input)
            content, lines = validation_json(validation), describe_validation(validation)
            print_result(content, lines, as_json=parsed.json)
            return 0
        output = given_path(parsed.output)
        if output is not None:
            del said["output.folder"]  # here it says where the run lies
        audit = audit_run(database_url(parsed), parsed.run, said, output)
        if audit.exit_status == 0:
            try_run(audit)
        content = {"run": parsed.run, "good": not audit.facts, "facts": audit.facts}
        print_result(content, describe_audit(audit), as_json=parsed.json)
        return audit.exit_status


if __name__ == "__main__":
    run_script(main)
