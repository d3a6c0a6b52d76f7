"""Tests of lib/jobs."""
