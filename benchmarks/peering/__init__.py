"""Engines side by side in one run: what `benchmarks.peers` is made of."""
