"""Tests, one file per feature, named after it."""
