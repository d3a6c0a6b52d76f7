"""The machinery of esm-ledger. Only lib.console parses arguments and prints,
but for `embed` of a notebook, which says what it does."""
