"""Convert free text to tokens with the tokenizer in a bundle."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import BundleError, InputError, MissingDependencyError

TOKENIZER_FILE = "tokenizer.json"


def tokenizer_installed() -> bool:
    """Whether free text can be tokenized here."""
    return importlib.util.find_spec("tokenizers") is not None


def tokenize(folder: Path, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokenize with special tokens, padded to the longest text.

    Args:
        folder: the bundle's tokenizer folder.
        texts: one per sample.

    Returns:
        Token ids and attention mask, both (B, L) int64.

    Raises:
        BundleError: the tokenizer cannot be read.
        InputError: a text is empty, or too long for the text encoder.
        MissingDependencyError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "free text", "text") from error
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # tokenizers raises bare Exception, and its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{path} is not a tokenizer ({error}); export again") from error
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"text is {text!r}, expected a description of the motion in words")
    encodings = tokenizer.encode_batch(list(texts))
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.overflowing:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise InputError(
                f"the text {shown!r} has more than {len(encoding.ids)} tokens, the most the bundle takes; shorten it"
            )
    ids, mask = ([getattr(encoding, name) for encoding in encodings] for name in ("ids", "attention_mask"))
    return np.array(ids, np.int64), np.array(mask, np.int64)
