"""The machinery of esm-ledger. Nothing in it parses arguments or prints, console.py apart."""

import os

# torch reads this when it first allocates: large buffers in huge pages, where the system offers
# them on request. Without it a forward pass spends a tenth of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
