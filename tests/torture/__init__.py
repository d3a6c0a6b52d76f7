"""Long trials: faults and hostile files, beyond what `make test` tries."""
