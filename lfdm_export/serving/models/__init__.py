"""The models behind the server, one class each; the `model.py` files of the repository only import them.

They run in processes that Triton's Python backend starts.
"""
