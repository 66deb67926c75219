"""Compares speculation policies under load: closed loops through a router, policies interleaved, medians of repeats."""
