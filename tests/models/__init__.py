"""Tests of lib/models."""
