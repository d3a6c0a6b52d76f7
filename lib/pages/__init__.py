"""What people look at: a report, figures, the database in a browser."""
