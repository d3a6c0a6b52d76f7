"""The machinery of esm-ledger. Only lib.console parses arguments and prints.

`embed` of a notebook prints what it does, too, unless it is told to say it elsewhere.
"""
