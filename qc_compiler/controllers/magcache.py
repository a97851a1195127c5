"""MagCache: the ratio of residual magnitudes predicts the error of reuse. Source: arXiv 2506.09045.

    γ = (mean|Δ_t| / mean|Δ_{t−k}|)^{1/k};   ε = |1 − γ^j| after j skipped steps
    reuse while Σ ε < threshold, at most K steps in a row; the first 20 % of the steps are always computed

γ comes from the region's last two computed steps; calibration may give the whole curve instead. 0.06, K = 3 and
20 % are diffusers' defaults.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import Controller, History, per_region


@dataclass(frozen=True)
class MagCache(Controller):
    """Reuses a region while its residual keeps its magnitude.

    Attributes:
        threshold: On the accumulated error.
        max_skip: K.
        retention: Share of the first steps that are always computed.
        ratios: γ of every step, if calibrated; empty estimates it online.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] = ()

    def decide(self, history: History) -> NDArray[np.bool_]:
        return per_region(history, [self._wants(history, r) for r in range(len(history.regions))])

    def _wants(self, history: History, region: int) -> bool:
        steps = history.num_steps or len(self.ratios)
        if steps and history.index < self.retention * steps:
            return True
        age = history.age(region)
        gamma = history.rate(region, Statistic.MAGNITUDE)
        if gamma is None or age > self.max_skip:
            return True
        first = history.index - age + 1
        gammas = [self.ratios[i] if i < len(self.ratios) else gamma for i in range(first, history.index + 1)]
        error = float(np.abs(1.0 - np.cumprod(gammas)).sum())
        return error >= self.threshold
