"""Which samples of many (cached) trajectories to calibrate on: a cached one is full of near-duplicates.

tap      A_kh = max(α·cos(x_k, x_h) + (1−α)·exp(−|t_k − t_h|), 0)    N samples × n of them, drawn at random
         L = D_r^{-1/2}·A·D_c^{-1/2}                                 D the sums of A's rows and of its columns
         k-means on the rows of [U₁ U₂ U₃]                           U the left singular vectors of three such L
         then the same number from each cluster
kmeans   the same number from each cluster of the centred samples themselves
uniform  evenly spaced in the order of steps
random   without regard to anything

Sources: TAP of Q&C, arXiv 2503.02508, Eq. 4–8. Ours: t is the index of the step, A is clamped at 0, one k-means is
shared by the three U side by side, the SVD is randomized, and n is at least k, so that k directions exist.
"""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from ..errors import OptionError, nearest

SELECTIONS = ("tap", "uniform", "random", "kmeans")
ALPHA = 0.5  # of the direction of a sample against its step, as the three numbers below in the paper
CLUSTERS = 100
SUBSAMPLES = 3
COLUMNS = 20  # a subsample is one part in so many
MIN_COLUMNS = 16  # ours, for few samples
NULL = 1e-6  # singular values below this part of the largest are noise of float32, and their vectors arbitrary
TINY = 1e-12


def select(method: str, samples: Tensor, steps: NDArray[np.int_], count: int, seed: int = 0) -> NDArray[np.int_]:
    """Returns the indices of the samples to calibrate on, distinct and ascending.

    Args:
        method: One of `SELECTIONS`.
        samples: Flattened intermediate samples (N, F).
        steps: The step (N,) that each was taken at.
        count: How many to choose, up to N.
        seed: Of every random choice; `uniform` makes none.

    Raises:
        OptionError: the method is unknown, shapes do not match, a sample is not finite, or `count` is not in 1..N.

    >>> select("uniform", torch.ones(6, 4), np.array([5, 4, 3, 2, 1, 0]), 3)
    array([0, 2, 4])
    """
    if method not in SELECTIONS:
        raise OptionError(f"method={method!r}: {nearest(method, SELECTIONS)}")
    steps = np.asarray(steps)
    if samples.ndim != 2 or samples.shape[1] == 0 or steps.shape != samples.shape[:1]:
        raise OptionError(f"samples {tuple(samples.shape)} at steps {steps.shape}: expected shapes (N, F) and (N,)")
    if not 1 <= count <= len(steps):
        raise OptionError(f"count={count}: expected 1 to {len(steps)}, the number of samples")
    samples = samples.detach().float().cpu()
    if not (finite := samples.isfinite().all(dim=1)).all():
        raise OptionError(f"samples[{int(finite.int().argmin())}] is not finite: leave it out, or look for its cause")

    rng = np.random.default_rng(seed)
    clusters = min(CLUSTERS, count)
    if method == "uniform":
        middles = (2 * np.arange(count) + 1) * len(steps) // (2 * count)
        chosen = np.argsort(steps, kind="stable")[middles]
    elif method == "random":
        chosen = rng.choice(len(steps), count, replace=False)
    elif method == "kmeans":
        chosen = _from_clusters((samples - samples.mean(dim=0)).numpy(), clusters, count, rng)
    else:
        chosen = _from_clusters(spectral_coordinates(samples, steps, clusters, rng), clusters, count, rng)
    return np.sort(chosen)


def affinity(
    samples: Tensor, steps: NDArray[np.int_], columns: NDArray[np.int_], alpha: float = ALPHA
) -> NDArray[np.float64]:
    """Returns A (N, n): how alike samples (N, F) are to some of them in direction and step. A zero has no direction.

    >>> affinity(torch.eye(2), np.array([0, 0]), np.array([1]))
    array([[0.5],
           [1. ]])
    """
    unit = torch.nn.functional.normalize(samples, dim=1)
    cosine = (unit @ unit[columns].T).double().numpy()
    time = steps.astype(np.float64)
    return np.maximum(alpha * cosine + (1 - alpha) * np.exp(-np.abs(time[:, None] - time[columns])), 0.0)


def normalized(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns D_r^{-1/2}·A·D_c^{-1/2}; a row of zeros stays one.

    >>> normalized(np.array([[4.0, 0.0], [0.0, 9.0], [0.0, 0.0]]))
    array([[1., 0.],
           [0., 1.],
           [0., 0.]])
    """
    rows, columns = (np.maximum(a.sum(axis=axis, keepdims=True), TINY) for axis in (1, 0))
    return a / np.sqrt(rows) / np.sqrt(columns)


def quotas(sizes: NDArray[np.int_], count: int) -> NDArray[np.int_]:
    """Divides `count` among clusters: evenly, none gets more than its size, a remainder goes to the largest.

    >>> quotas(np.array([1, 5, 9]), 8)
    array([1, 3, 4])
    """
    quota = np.zeros_like(sizes)
    largest_first = np.argsort(-sizes, kind="stable")
    while left := count - int(quota.sum()):
        open_ = largest_first[(quota < sizes)[largest_first]]
        quota[open_[:left]] += 1
    return quota


def spectral_coordinates(
    samples: Tensor, steps: NDArray[np.int_], clusters: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Returns TAP's coordinates of the samples: the left singular vectors of all subsamples side by side."""
    num_columns = min(len(steps), max(len(steps) // COLUMNS, clusters, MIN_COLUMNS))
    parts = []
    for _ in range(SUBSAMPLES):
        columns = rng.choice(len(steps), num_columns, replace=False)
        u, s, _ = randomized_svd(
            normalized(affinity(samples, steps, columns)), min(clusters, num_columns), random_state=_state(rng)
        )
        parts.append(u[:, s > NULL * s[0]])
    return np.concatenate(parts, axis=1)


def _from_clusters(
    points: NDArray[np.floating], clusters: int, count: int, rng: np.random.Generator
) -> NDArray[np.int_]:
    """Returns `count` indices of points (N, d), as evenly as possible from the clusters that k-means finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates: fewer distinct points than clusters
        labels = KMeans(clusters, random_state=_state(rng)).fit_predict(points)
    sizes = np.bincount(labels, minlength=clusters)
    members = (np.flatnonzero(labels == cluster) for cluster in range(clusters))
    return np.concatenate([rng.choice(of, n, replace=False) for of, n in zip(members, quotas(sizes, count)) if n])


def _state(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
