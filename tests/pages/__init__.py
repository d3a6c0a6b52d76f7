"""Tests of lib/pages."""
