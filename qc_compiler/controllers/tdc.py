"""TDC, temporal delta cache. Source: 6Bit-Diffusion, arXiv 2603.18742.

    r = ‖Δ_t − Δ_{t−k}‖ / ‖Δ_{t−k}‖ / k        from the last two computed steps, in L1
    reuse while Σ r over the skipped steps < τ and fewer than N_max steps were skipped in a row

N_max = 2 is the paper's; τ = 0.4 is ours, the paper gives none.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import Controller, History, per_region


@dataclass(frozen=True)
class TDC(Controller):
    """Reuses a region until the change it may have accumulated reaches the threshold."""

    threshold: float = 0.4
    max_skip: int = 2

    def decide(self, history: History) -> NDArray[np.bool_]:
        return per_region(history, [self._wants(history, r) for r in range(len(history.regions))])

    def _wants(self, history: History, region: int) -> bool:
        rate = history.rate(region, Statistic.CHANGE)
        age = history.age(region)
        return rate is None or age > self.max_skip or age * rate >= self.threshold
