"""Pages for people: the report of a run, its figures, and the run database in a browser."""
