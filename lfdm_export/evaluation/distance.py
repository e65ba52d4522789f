"""Fréchet distance between two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError

Float64Array = NDArray[np.float64]


def frechet_distance(first: NDArray[np.floating], second: NDArray[np.floating], *, unbiased: bool = False) -> float:
    """Return the Fréchet distance of two sets of features, assuming normal distributions; 0 for equal sets.

    Args:
        first: (N, F) features, one row per clip.
        second: (M, F) features.
        unbiased: divide by N - 1 in the covariances, as published distances of clips and pictures do; else by N.

    Raises:
        InputError: a set has too few rows for a covariance.

    Source: Dowson and Landau, The Fréchet Distance between Multivariate Normal Distributions, 1982.
    """
    means: list[Float64Array] = []
    covariances: list[Float64Array] = []
    for part in (first, second):
        if len(part) <= unbiased:
            raise InputError(
                f"a set of {len(part)} clips has no covariance, which the Fréchet distance needs; give 2 or more"
            )
        means.append(np.mean(part, axis=0, dtype=np.float64))
        covariances.append(np.atleast_2d(np.cov(part.astype(np.float64), rowvar=False, bias=not unbiased)))
    return normal_distance(means[0], covariances[0], means[1], covariances[1])


def normal_distance(
    mean: Float64Array, covariance: Float64Array, other_mean: Float64Array, other_covariance: Float64Array
) -> float:
    """Return the squared Fréchet distance of two normal distributions, with means (F,) and covariances (F, F).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the square root is the sum of the square roots of the
    eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric. So no matrix without symmetry is factored, and covariances
    of fewer clips than features, which are singular, need no offset.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other_covariance @ root)
    cross = np.sqrt(np.clip(mixed, 0, None)).sum()
    distance = ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross
    return float(max(distance, 0.0))
