"""Parity: each representation of the model compared with the one before."""
