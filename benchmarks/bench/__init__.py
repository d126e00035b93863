"""Latency of a bundle on every backend: one process a variant, rounds that take turns, one report."""
