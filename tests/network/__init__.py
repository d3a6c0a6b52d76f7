"""Tests of lib/network."""
