"""One module per schema version: what changes from the version before."""
