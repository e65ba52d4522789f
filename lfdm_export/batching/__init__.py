"""The step scheduler of the server."""
