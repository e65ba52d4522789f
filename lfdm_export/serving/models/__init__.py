"""The server's Python models, one class each; the repository's `model.py` files only import them.

They run in processes that Triton's Python backend starts.
"""
