"""The machinery of esm-ledger. Nothing in it parses arguments or prints, console.py apart."""

import os

# torch reads this when it first allocates: large buffers in huge pages, where the system offers
# them on request. Without it a forward pass spends a tenth of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# What oneDNN prepares for a shape is kept, by it and by torch, for 1,024 shapes of each operation:
# over 1 GB, and on packs without padding few shapes come again after their own pack.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")
os.environ.setdefault("LRU_CACHE_CAPACITY", "192")
