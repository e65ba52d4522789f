"""Serving with Triton: what is agreed with clients, the models behind it, and the server's upkeep."""
