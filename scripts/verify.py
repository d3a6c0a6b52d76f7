"""Compute a sample of a run again with fair-esm, transformers or PEFT in float32, and compare.

    python scripts/verify.py --run 1
    python scripts/verify.py --run 1 --sample 100 --seed 7
    python scripts/verify.py --run 1 --esm-model /new/place/esm2_t33_650M_UR50D.pt

First it checks identity as resume.py does: the rows and files of the run, the given weights and the
given input, by their digests. The library of the weights' format computes: fair-esm for a .pt file,
transformers for a Hugging Face folder, PEFT for an adapter. Where it is not installed, fair-esm
computes with tensors that this program reads, and the output says so.

It prints the worst and median error and cosine of every column beside the bounds for the precision
of the run. The same seed draws the same records; the longest, the shortest, a truncated one and two
that share a sequence are always among them, and of a run that copied some from earlier runs one of
these and one computed. Exit status: 0 within the bounds, 1 outside, 2 nothing to verify or weights
or input not found, 3 identity refused, 4 disk, database or memory failed, 130, 143 or 129
interrupted.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import (
    arguments,
    database_url,
    folder_argument,
    folder_of_run,
    overrides,
    run_number,
    settings_arguments,
)
from lib.console.output import note, print_json, print_line, print_table
from lib.console.program import run_script
from lib.jobs.interruption import Interruption
from lib.jobs.verification import COLUMNS, verify_run


def main(argv: Sequence[str] | None = None) -> int:
    """Verify a run and print its errors beside the bounds."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=run_number, required=True, metavar="N", help="the run")
    parser.add_argument(
        "--sample", type=int, default=20, metavar="N", help="records to draw (default 20)"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of the sample (default: a new one every time)"
    )
    folder_argument(parser)
    settings_arguments(parser, "esm_model", "input")
    parsed = parser.parse_args(argv)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    with Interruption().handled():
        url, said = database_url(parsed), overrides(parsed)
        output = folder_of_run(parsed)
        found = verify_run(url, parsed.run, said, parsed.sample, seed, note, output)
    if parsed.json:
        print_json(found.json())
    else:
        print_table(COLUMNS, [one.cells() for one in found.agreements])
        print_line(found.describe())
    return 0 if found.good else 1


if __name__ == "__main__":
    run_script(main)
