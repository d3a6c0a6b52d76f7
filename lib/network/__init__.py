"""Everything that computes: the ESM-2 network and what feeds it."""
