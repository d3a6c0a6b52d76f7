"""Detect an ESM-2 model: print its properties and where each came from.

    python scripts/detect.py --esm-model esm2_t33_650M_UR50D
    python scripts/detect.py --esm-model models/esm2_untrained_t6_8M.pt --json

It downloads nothing; for a released name that is not on disk it shows the values of the catalog. It
reads no tensor data, but takes the digest of weights whose shape and size are those of a published
model. Exit status: 0 detected, 2 refused.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, overrides, settings_arguments
from lib.console.display import describe_detection, detection_json
from lib.console.output import print_json, print_table
from lib.console.program import run_script
from lib.models.detection import detect
from lib.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Detect and print."""
    parser = arguments(__doc__)
    settings_arguments(parser, "esm_model", "repr_layers")
    parsed = parser.parse_args(argv)
    detection = detect(load_settings(parsed.config, overrides(parsed)).model)
    proof = detection.take_proof()
    if parsed.json:
        print_json(detection_json(detection, proof))
    else:
        rows = describe_detection(detection, proof=proof)
        print_table(["property", "value", "source"], rows)
    return 0


if __name__ == "__main__":
    run_script(main)
