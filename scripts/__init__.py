"""One job each: parse arguments, call lib, print."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `python -m scripts.embed` imports _start, too
