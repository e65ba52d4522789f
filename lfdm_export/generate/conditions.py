"""The condition of a clip: a label, a free text, or a text embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.bundle.manifest import TEXT_STAGE
from lfdm_export.bundle.reader import TOKENIZER_FOLDER
from lfdm_export.errors import InputError
from lfdm_export.generate.arguments import condition_name, embedding_rows, per_sample
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.generate.tokenizer import tokenize

Float32: TypeAlias = NDArray[np.float32]


def find_conditions(
    stages: StageRunner,
    label: str | Sequence[str] | None,
    text: str | Sequence[str] | None,
    text_embedding: ArrayLike | None,
) -> tuple[tuple[str, ...] | None, Float32]:
    """The words of the samples, if any, and their embeddings (B, text_width).

    Args:
        stages: runs the text encoder.
        label: a label, or one per sample.
        text: free text, or one per sample.
        text_embedding: (text_width,) or (B, text_width).

    Raises:
        InputError: not exactly one of the three is given, or it is not valid for the bundle.
        EngineError: the text encoder cannot be loaded or fails.
    """
    bundle = stages.bundle
    condition_name(label, text, text_embedding)
    if label is not None:
        rows = [bundle.label_index(one) for one in per_sample(label, "label")]
        return tuple(bundle.labels[row] for row in rows), bundle.embeddings[rows]
    if text is not None:
        texts = per_sample(text, "text")
        return texts, embed_texts(stages, texts)
    return None, embedding_rows(cast(ArrayLike, text_embedding), bundle.manifest.geometry.text_width)


def embed_texts(stages: StageRunner, texts: Sequence[str]) -> Float32:
    """Embed free texts as (B, text_width) float32.

    Raises:
        InputError: the bundle has no text encoder, or a text is not valid.
        EngineError: the text encoder cannot be loaded or fails.
    """
    bundle = stages.bundle
    if not bundle.manifest.has_text:
        known = ", ".join(bundle.labels) or "none"
        raise InputError(
            f"this bundle has no text encoder; give one of its labels ({known}) or a text embedding, "
            "or export again with a text encoder"
        )
    # One at a time: padding would change the last bits, and a sample depends on no other.
    rows = [stages.run(TEXT_STAGE, *tokenize(bundle.path / TOKENIZER_FOLDER, [text]))[0] for text in texts]
    return np.concatenate(rows)
