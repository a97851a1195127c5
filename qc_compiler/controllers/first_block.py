"""First-block cache: the residual of block 0 tells when the others must be computed. Source: ParaAttention, diffusers.

    compute block 0 at every step;  reuse the rest while Σ relL1(Δ₀_t, Δ₀_{t−1}) since they were computed < threshold

diffusers decides within the step, after block 0; here the decision is taken before the step, from the change up to
the last step, so that no kernel waits for it. 0.08 is diffusers' typical threshold.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import Controller, History


@dataclass(frozen=True)
class FirstBlock(Controller):
    """Computes the first block always and the others together."""

    threshold: float = 0.08
    max_skip: int = 8

    def decide(self, history: History) -> NDArray[np.bool_]:
        decision = ~history.in_blocks
        first, *others = np.flatnonzero(history.in_blocks)
        decision[first] = True
        if others:
            last = max((step.index for step in history.steps if step.computed[others].all()), default=-1)
            since = [s for s in history.steps if s.index > last] or history.steps[-1:]
            change = sum(float(s.statistics[first, Statistic.CHANGE]) for s in since)
            unknown = len(history.computed_at(int(first))) < 2
            decision[others] = unknown or change >= self.threshold or history.index - last > self.max_skip
        return decision
