"""Backends that run a stage: one module per backend, all with ``run(feeds) -> outputs``."""
