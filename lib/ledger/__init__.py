"""What is on record: the run database, checkpoint files, identity, history. No torch."""
