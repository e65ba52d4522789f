"""Distance between two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the Fréchet distance of two sets of features (N, F), assuming normal distributions; 0 for equal sets.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the square root is the sum of the square roots of the
    eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    means: list[Float64Array] = [np.mean(part, axis=0, dtype=np.float64) for part in (first, second)]
    covariances = [np.atleast_2d(np.cov(part.astype(np.float64), rowvar=False, bias=True)) for part in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ covariances[1] @ root)
    cross = np.sqrt(np.clip(mixed, 0, None)).sum()
    distance = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross
    return float(max(distance, 0.0))
