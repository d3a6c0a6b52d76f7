"""The machinery of esm-ledger. Nothing in it parses arguments or prints, console.py apart."""
