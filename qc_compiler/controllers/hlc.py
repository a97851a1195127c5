"""HLC, hierarchical latent caching. Source: QuantCache, arXiv 2503.06545, Eq. 5–6.

    D = (relL1(Δ_t, Δ_{t−k}) / k) · motion        from the last computed step t and the one k steps before
    τ = τ_max if D < δ₁;  τ_mid if D < δ₂;  τ_min otherwise          steps until the next computation

The paper gives no thresholds. τ = (12, 6, 3) and δ = (0.03, 0.09) follow AdaCache's 100-step code book (arXiv
2411.02397); for other lengths τ scales with N / 100, and a length not known yet is taken for 50. The same rule serves
every level: a region is the network, a group, a block or a sub-layer. The first step and the last two are always
computed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import Controller, History, per_region

_PAPER_STEPS, _USUAL_STEPS = 100, 50


@dataclass(frozen=True)
class HLC(Controller):
    """Skips longer where features change and move less.

    Attributes:
        tau: Steps until the next computation for small, middling and large D, at 100 steps.
        threshold: δ₁, the lower limit between them; δ₂ is three times as much. 0 computes every step.
        max_skip: Most steps reused in a row; None leaves it to τ.
    """

    tau: tuple[int, int, int] = (12, 6, 3)
    threshold: float = 0.03
    max_skip: int | None = None

    def decide(self, history: History) -> NDArray[np.bool_]:
        if self.threshold == 0 or history.near_end(2):
            return np.ones(len(history.regions), dtype=np.bool_)
        return per_region(history, [self._wants(history, r) for r in range(len(history.regions))])

    def _wants(self, history: History, region: int) -> bool:
        change = history.rate(region, Statistic.CHANGE)
        if change is None:
            return True
        motion = float(history.computed_at(region)[-1].statistics[region, Statistic.MOTION])
        limits = (self.threshold, 3 * self.threshold)
        tau = self.tau[int(np.searchsorted(limits, change * motion, side="right"))]
        until = max(1, round(tau * (history.num_steps or _USUAL_STEPS) / _PAPER_STEPS))
        if self.max_skip is not None:
            until = min(until, self.max_skip + 1)
        return history.age(region) >= until
