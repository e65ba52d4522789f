"""Outputs of the untouched networks, for parity."""
