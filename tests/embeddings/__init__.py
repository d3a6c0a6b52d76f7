"""Tests of lib/embeddings."""
