"""Faithful networks -> deployable stage modules; every rewrite is tested against the untouched network."""
