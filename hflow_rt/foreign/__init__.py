"""Reads model files that others published. Nothing a file says is imported, looked up or executed."""
