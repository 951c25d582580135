"""Evaluation: benchmarks, exact scorers, judges, and the code that runs them."""
