"""ESM-2 on disk: found, detected, read, downloaded."""
