"""Download the weights of a released model to where embed looks for them, and embed nothing.

    python scripts/download.py --esm-model esm2_t33_650M_UR50D
    python scripts/download.py --esm-model facebook/esm2_t33_650M_UR50D
    python scripts/download.py --esm-model models/adapter
    python scripts/download.py --esm-model esm2_t33_650M_UR50D --include contacts

Of a LoRA adapter it downloads the released base; with --include contacts also the contact
regression. What is not the published file is refused, and what is on disk is not downloaded again.
Exit status: 0 the weights are on disk, 2 settings or weights refused, 4 disk or network failed,
130, 143 or 129 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments, overrides, settings_arguments
from lib.console.bars import download_bar
from lib.console.display import describe_weights
from lib.console.output import note, print_result
from lib.console.program import run_script
from lib.jobs.fetching import offer_of, with_weights
from lib.jobs.interruption import Interruption
from lib.models.detection import detect
from lib.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Detect, say what is to be downloaded, download it."""
    parser = arguments(__doc__)
    settings_arguments(parser, "esm_model", "include")
    parsed = parser.parse_args(argv)
    with Interruption().handled():
        settings = load_settings(parsed.config, overrides(parsed))
        detection = detect(settings.model, contacts="contacts" in settings.output.include)
        note(describe_weights(detection, offer_of(settings, detection)))
        detection = with_weights(settings, detection, download_bar)
    weights, regression = detection.require_weights().unadapted, detection.regression
    content = {
        "weights": str(weights.path),
        "contact_regression": None if regression is None else str(regression.path),
    }
    beside = "" if regression is None else f", contact regression: {regression.path}"
    print_result(content, [f"weights: {weights.path}{beside}"], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
