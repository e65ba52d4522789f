"""Embeddings of labels without a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32Array: TypeAlias = NDArray[np.float32]


def label_table(labels: Sequence[str], width: int) -> dict[str, Float32Array]:
    """One row of a Hadamard matrix per label: entries of 1 and -1, rows orthogonal to each other.

    All labels are equally far from each other, and from the null embedding (zeros). Nothing is random, and nothing is
    trained: the first layer that takes an embedding is linear and can learn what it needs.

    Args:
        labels: at most width - 1, all different.
        width: a power of two.

    Returns:
        By label, (width,) float32.

    Raises:
        ValueError: the width is not a power of two or has too few rows, or a label appears twice.
    """
    if width < 2 or width & (width - 1):
        raise ValueError(f"text_width is {width}, expected a power of two if no text encoder is used")
    if len(labels) >= width or len(set(labels)) != len(labels):
        raise ValueError(f"{len(labels)} labels, expected at most {width - 1}, all different; use a larger text_width")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    # The first row is all ones, which equals a bias.
    return {label: matrix[row + 1].copy() for row, label in enumerate(labels)}
