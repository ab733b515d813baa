"""Benchmarks: one measured table per claim. `python -m bench.step`, `python -m bench.encoder`."""
