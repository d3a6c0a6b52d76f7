"""Projection: vectors as points on a plane, by principal component analysis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Projection", "project"]


@dataclass(frozen=True)
class Projection:
    """Vectors on their first two principal axes.

    points: (n, 2), relative to the mean of the vectors and in their unit.
    shares: (2,) share of the variance that each axis explains, 0 to 1.
    """

    points: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]


def project(vectors: npt.NDArray[np.float32]) -> Projection | None:
    """Project (n, width) vectors on the two axes along which they differ most.

    The axes are the right singular vectors of the centred matrix (Jolliffe, Principal Component
    Analysis, 2002, ch. 3.5). Their signs are arbitrary; here the farthest point of each axis is
    positive. Returns None for fewer than three vectors, or if all are equal.
    """
    if len(vectors) < 3:
        return None
    centred = vectors.astype(np.float64)
    centred -= centred.mean(axis=0)
    left, singular, _right = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2
    # Rounding leaves tiny differences between vectors that are all equal.
    if singular[0] <= 1e-12 * len(vectors) * np.abs(vectors).max():
        return None
    points = left[:, :2] * singular[:2]
    farthest = np.abs(points).argmax(axis=0)
    points *= np.where(points[farthest, [0, 1]] < 0, -1, 1)
    return Projection(points, variance[:2] / variance.sum())
