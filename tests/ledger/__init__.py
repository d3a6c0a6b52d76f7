"""Tests of lib/ledger."""
