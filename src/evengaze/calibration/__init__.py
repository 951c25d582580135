"""Measuring a model's bias: what text attends to by position, curves fitted to it, and whether they help."""
