"""Passes over exported graphs: bodies that suit a backend, and lower precisions."""
