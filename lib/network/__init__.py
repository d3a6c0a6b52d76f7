"""Everything that computes: the ESM-2 network and what feeds it."""

import os

# torch reads these when it first allocates or calls oneDNN, not when it is imported, so they are
# set in time here. They are not set in lib: what only reads vectors must not change the
# environment of its caller.

# Put large buffers into huge pages where Linux offers them on request. Without this, a forward
# pass spends a tenth of its time on page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# oneDNN and torch each keep what they prepare for a shape, for 1,024 shapes of each operation by
# default. That grows beyond 1 GB, and without padding a shape seldom returns after its own pack.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")
os.environ.setdefault("LRU_CACHE_CAPACITY", "192")
