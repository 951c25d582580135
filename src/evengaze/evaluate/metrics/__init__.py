"""Scoring rules as plain functions, one module a benchmark family."""
