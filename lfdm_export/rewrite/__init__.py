"""Faithful networks -> deployable stage modules; every rewrite is provable against the untouched network."""
