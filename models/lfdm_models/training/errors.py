"""The error that training raises on purpose."""


class TrainingError(RuntimeError):
    """Training cannot go on as asked; the text is one sentence for the user: what, found, expected, what to do."""
