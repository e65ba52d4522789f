"""Passes over exported graphs: operator bodies per backend, and lower precisions."""
