"""Serving with Triton: the model repository, its Python models, the front for clients, and the server process."""
