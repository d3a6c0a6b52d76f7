"""Write an untrained ESM-2 model in the format of a release, for trials without a download.

    python scripts/make_model.py --like esm2_t6_8M_UR50D --to models/esm2_untrained_t6_8M.pt
    python scripts/make_model.py --num-layers 2 --hidden-dim 64 --attention-heads 4 --to small.pt
    python scripts/make_model.py --like esm2_t6_8M_UR50D --format huggingface --to models/untrained

The contact regression is written beside a fair-esm .pt, or into the file of a Hugging Face folder
(config.json and model.safetensors); a seed gives the same tensors in both. The weights are random,
with outlier channels like those of trained transformers: their vectors mean nothing.
Exit status: 0 written, 2 refused, 4 disk failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

import torch

from lib.catalog import RELEASED
from lib.console.arguments import arguments, whole_number
from lib.console.output import print_result
from lib.console.program import run_script
from lib.models.untrained import make_folder, make_model

_SEED = whole_number(-(1 << 63), (1 << 64) - 1)  # what torch takes


def main(argv: Sequence[str] | None = None) -> int:
    """Write the model and print where it is."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="the .pt or the folder to write"
    )
    parser.add_argument(
        "--format", choices=["fair-esm", "huggingface"], default="fair-esm", help="default fair-esm"
    )
    parser.add_argument("--like", choices=list(RELEASED), help="take the shape of this model")
    parser.add_argument("--num-layers", type=int, help="transformer layers")
    parser.add_argument("--hidden-dim", type=int, help="width of a vector")
    parser.add_argument("--attention-heads", type=int, help="heads per layer")
    parser.add_argument(
        "--no-token-dropout", action="store_true", help="cfg says token_dropout False"
    )
    parser.add_argument("--seed", type=_SEED, default=0, help="of the random numbers (default 0)")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parsed = parser.parse_args(argv)
    shape = [parsed.num_layers, parsed.hidden_dim, parsed.attention_heads]
    if parsed.like:
        like = RELEASED[parsed.like].shape
        given = zip(shape, (like.num_layers, like.hidden_dim, like.attention_heads), strict=True)
        shape = [asked if asked is not None else released for asked, released in given]
    if None in shape:
        parser.error("--num-layers, --hidden-dim and --attention-heads, or --like, are required")
    make = make_model if parsed.format == "fair-esm" else make_folder
    regression = make(
        parsed.to,
        *shape,
        seed=parsed.seed,
        dtype=getattr(torch, parsed.dtype),
        token_dropout=not parsed.no_token_dropout,
    )
    line = f"untrained weights: {parsed.to}, contact regression: {regression}"
    content = {"weights": str(parsed.to), "regression": str(regression), "untrained": True}
    print_result(content, [line], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
