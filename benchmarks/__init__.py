"""Timings, run from the root of the source tree: ``python -m benchmarks.attention``."""
