"""What is measured of a computed region: sums in the graph, ratios on the host when a rule asks for them."""

import functools
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TINY = 1e-12


class Statistic(IntEnum):
    """The columns of a step's statistics: float32, one row a region, zero where the region was reused."""

    GAMMA = 0  # relL1(y, x) = mean|y − x| / mean|x|
    CHANGE = 1  # relL1(Δ, Δ_cached) against the newest cached residual
    MAGNITUDE = 2  # mean|Δ| / mean|Δ_cached|
    COSINE = 3  # cosine of the region's input and output: its redundancy, read as SRAP's neighbour similarity
    MOTION = 4  # Σ|Δ[f+1] − Δ[f]| / Σ(|Δ[f+1]| + |Δ[f]|) over frames; 1 for images


class Sum(IntEnum):
    """The columns of `region_sums`, over all elements and all streams of a region."""

    BEFORE = 0  # Σ|x|
    RESIDUAL = 1  # Σ|Δ|
    CACHED = 2  # Σ|Δ_cached|
    CHANGE = 3  # Σ|Δ − Δ_cached|
    DOT = 4  # Σ x·y
    BEFORE_SQUARED = 5  # Σ x²
    AFTER_SQUARED = 6  # Σ y²
    FLOW = 7  # Σ|Δ[f+1] − Δ[f]| of the last stream
    FLOW_SIZE = 8  # Σ(|Δ[f+1]| + |Δ[f]|) of the last stream


def region_sums(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    residuals: Sequence[Tensor],
    cached: Sequence[Tensor],
    num_frames: int,
) -> Tensor:
    """Returns the sums of a region, float32 (len(Sum),).

    Args:
        before: x of each stream; where a cached value has no base, the cached value.
        after: y of each stream; where a cached value has no base, the value.
        residuals: Δ of each stream.
        cached: The newest cached Δ of each stream.
        num_frames: See `_flow`.
    """
    streams = []
    for tensors in zip(before, after, residuals, cached):
        x, y, new, old = (tensor.float() for tensor in tensors)
        sizes = [_size(x), _size(new), _size(old), _size(new - old)]
        streams.append([*sizes, (x * y).sum(), (x * x).sum(), (y * y).sum()])
    totals = [functools.reduce(torch.add, sums) for sums in zip(*streams)]
    return torch.stack([*totals, *_flow(residuals[-1].float(), num_frames)])


def _size(tensor: Tensor) -> Tensor:
    return tensor.abs().sum()


def _flow(delta: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Returns Σ|Δ[f+1] − Δ[f]| and Σ(|Δ[f+1]| + |Δ[f]|) over the frames of a residual; equal where none are known.

    Args:
        delta: Tokens as (B·F, S, D), as (B·S, F, D), or as (B, F·S, D) in raster order.
        num_frames: F; 1 for images.

    Source: the motion factor of HLC, arXiv 2503.06545, Eq. 5, normalized so that it is free of units.
    """
    if num_frames > 1 and delta.dim() == 3:
        rows, tokens, width = delta.shape
        video = None
        if isinstance(tokens, int) and tokens % num_frames == 0:
            video = delta.reshape(rows, num_frames, -1, width)
        elif isinstance(rows, int) and rows % num_frames == 0:
            video = delta.reshape(-1, num_frames, tokens, width)
        if video is not None:
            ahead, behind = video[:, 1:], video[:, :-1]
            return _size(ahead - behind), _size(ahead) + _size(behind)
    one = torch.ones((), device=delta.device)
    return one, one


@np.errstate(invalid="ignore", over="ignore")  # NaN and Inf pass through: the runtime looks for them
def ratios(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the statistics (…, len(Statistic)) of sums (…, len(Sum))."""
    s = np.moveaxis(sums.astype(np.float64), -1, 0)
    found = {
        Statistic.GAMMA: s[Sum.RESIDUAL] / (s[Sum.BEFORE] + _TINY),
        Statistic.CHANGE: s[Sum.CHANGE] / (s[Sum.CACHED] + _TINY),
        Statistic.MAGNITUDE: s[Sum.RESIDUAL] / (s[Sum.CACHED] + _TINY),
        Statistic.COSINE: s[Sum.DOT] / (np.sqrt(s[Sum.BEFORE_SQUARED] * s[Sum.AFTER_SQUARED]) + _TINY),
        Statistic.MOTION: s[Sum.FLOW] / (s[Sum.FLOW_SIZE] + _TINY),
    }
    return np.stack([found[column] for column in Statistic], axis=-1).astype(np.float32)
