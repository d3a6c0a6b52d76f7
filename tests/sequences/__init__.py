"""Tests of lib/sequences."""
