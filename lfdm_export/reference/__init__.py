"""What the untouched networks give, for parity."""
