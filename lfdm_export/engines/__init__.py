"""Backends that run a stage: one module each, all giving ``run(feeds) -> outputs``."""
