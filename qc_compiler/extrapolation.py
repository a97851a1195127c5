"""Weights of extrapolation: polynomials through unevenly spaced steps, and fitted weights moved to other steps."""

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


def moved_weights(
    fitted: NDArray[np.float32],
    old_times: NDArray[np.float64],
    old_computed: NDArray[np.bool_],
    times: NDArray[np.float64],
    computed: NDArray[np.bool_],
    depth: int,
) -> NDArray[np.float32]:
    """Returns weights (M, K) for the skipped ones of M steps, from those fitted for the skipped ones of N others.

    A skipped step lies between two computed ones. Just as far along between their counterparts, the fitted weights are
    read off, linearly between skipped steps. Where nothing was skipped there, or the weights fitted were all zero, they
    become those of a line through the last two computed steps.

    Args:
        fitted: (N, K).
        old_times: (N,), in order.
        old_computed: (N,); the counterpart of each is the step that lies nearest to it, and is computed.
        times: (M,), in order.
        computed: (M,).
        depth: How many of the K weights are of the last computed steps, newest first; the others are zero in a line.
    """
    counterpart = np.abs(old_times[:, None] - times).argmin(axis=1)
    weights = np.zeros((len(times), fitted.shape[1]), dtype=np.float32)
    for step in np.flatnonzero(~computed):
        known = np.flatnonzero(computed[:step])[::-1][: min(2, depth)]
        if not known.size:
            continue
        begin = max(np.flatnonzero(old_computed & (counterpart == known[0])), default=len(old_times))
        end = begin + 1 + next(iter(np.flatnonzero(old_computed[begin + 1 :])), len(old_times))
        skipped = [i for i in range(begin + 1, min(end, len(old_times))) if fitted[i].any()]
        if not skipped:
            weights[step, : len(known)] = polynomial_weights(times[known].tolist(), times[step])
            continue
        since = abs(times[step] - times[known[0]])
        if end < len(old_times):
            since *= abs((old_times[end] - old_times[begin]) / (times[counterpart[end]] - times[known[0]]))
        elapsed = np.abs(old_times[skipped] - old_times[begin])
        weights[step] = [np.interp(since, elapsed, column) for column in fitted[skipped].T]
    return weights
