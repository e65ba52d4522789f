"""The exception that training raises on purpose."""


class TrainingError(RuntimeError):
    """Training cannot proceed as requested; the text is one sentence: what, found, expected, what to do."""
