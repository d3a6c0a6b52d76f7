"""The machinery of esm-ledger. Only lib.console parses arguments or prints."""
