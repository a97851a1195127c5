"""Weights of polynomial extrapolation from unevenly spaced steps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def polynomial_weights(known: Sequence[float], at: float) -> NDArray[np.float32]:
    """Returns w with f(at) = Σ wⱼ·f(knownⱼ), exact for polynomials of degree len(known) − 1.

    Args:
        known: Where f is known (timesteps or step numbers), newest first, all different.
        at: Where it is wanted.

    Source: Lagrange. TaylorSeer (arXiv 2503.06923) builds finite differences for even spacing instead; for orders 0
    and 1 the two agree, for order 2 this one is exact on parabolas.

    >>> polynomial_weights([900.0, 1000.0], 850.0)
    array([ 1.5, -0.5], dtype=float32)
    """
    points = np.asarray(known, dtype=np.float64)
    weights = np.ones(len(points))
    for j, point in enumerate(points):
        others = np.delete(points, j)
        weights[j] = np.prod((at - others) / (point - others))
    return weights.astype(np.float32)
