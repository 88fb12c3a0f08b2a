"""Benchmarks of speed and memory, with baselines in the same run: `python -m benchmarks.NAME`."""
