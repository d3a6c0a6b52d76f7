"""Build the kernel that computes attention on a CPU with AVX-512, for this Python's torch.

    python scripts/kernel.py

make setup does so. It needs a C++ compiler ($CXX, or c++) and some ten seconds; a kernel that is
built stays, and one that cannot be built is done without. Exit status: 0 built or there, 4 not.
"""

from __future__ import annotations

from collections.abc import Sequence

if __name__ == "__main__":
    import _start  # Ctrl-C and a missing package are one line

from lib.console.arguments import arguments
from lib.console.output import print_result
from lib.console.program import run_script
from lib.network.fused import build


def main(argv: Sequence[str] | None = None) -> int:
    """Build, and say where."""
    parsed = arguments(__doc__).parse_args(argv)
    kernel = build()
    print_result({"kernel": str(kernel)}, [f"attention kernel: {kernel}"], as_json=parsed.json)
    return 0


if __name__ == "__main__":
    run_script(main)
