"""TeaCache: the modulated input of the first block tells how much the output will change. Source: arXiv 2411.19108.

    reuse while Σ poly(relL1(m_t, m_{t−1})) since the last computed step < threshold

m is the row `probe`, taken at every step at which the graph runs. The polynomial is fitted at calibration for this
model; without a plan it is the identity. The decision uses the change up to the step before (see `first_block`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import Controller, History


@dataclass(frozen=True)
class TeaCache(Controller):
    """Accumulates the rescaled change of the probe.

    Attributes:
        threshold: 0.15 lies between the paper's slow (0.1) and fast (0.2) settings for Open-Sora.
        polynomial: Coefficients, highest power first, as `numpy.polyval` takes them.
        max_skip: Most steps reused in a row.
    """

    threshold: float = 0.15
    polynomial: tuple[float, ...] = (1.0, 0.0)
    max_skip: int = 8

    def decide(self, history: History) -> NDArray[np.bool_]:
        probe = history.regions.index("probe")
        others = history.in_blocks
        last = max((step.index for step in history.steps if step.computed[others].all()), default=-1)
        since = [step for step in history.steps if step.index > last] or history.steps[-1:]
        changes = np.array([step.statistics[probe, Statistic.CHANGE] for step in since], dtype=np.float64)
        accumulated = float(np.maximum(np.polyval(self.polynomial, changes), 0.0).sum())
        unknown = len(history.steps) < 2
        wants = unknown or accumulated >= self.threshold or history.index - last > self.max_skip
        return np.where(others, wants, True)
