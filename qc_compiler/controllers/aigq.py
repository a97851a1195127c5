"""AIGQ, how many bits the activations get at a step. Source: QuantCache, arXiv 2503.06545, Eq. 8.

    D = (relL1(Δ_t, Δ_{t−k}) / k) · motion        of the linear's block, as in HLC
    8 bits if D < θ₁;  6 if D < θ₂;  4 otherwise  read literally: a small D means a long skip, so that the step which is
                                                  computed is reused often and must be good
    inverse: 4, 6, 8                              what the paper's prose says

16 bits where nothing is known yet. The paper gives no θ; ours are HLC's δ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import History, PrecisionRule

UNKNOWN = 3  # the last of `formats.schemes.ONLINE`: 16 bits


@dataclass(frozen=True)
class AIGQ(PrecisionRule):
    """
    Attributes:
        threshold: θ₁; θ₂ is three times as much.
        inverse: Fewer bits for a small D.
    """

    threshold: float = 0.03
    inverse: bool = False

    def decide(self, history: History | None, regions: Sequence[int], kept: NDArray[np.bool_]) -> NDArray[np.int_]:
        return np.array([self._choice(history, region) for region in regions], dtype=np.int_)

    def _choice(self, history: History | None, region: int) -> int:
        change = None if history is None else history.rate(region, Statistic.CHANGE)
        if history is None or change is None:
            return UNKNOWN
        motion = float(history.computed_at(region)[-1].statistics[region, Statistic.MOTION])
        if np.isnan(change * motion):
            return UNKNOWN
        place = int(np.searchsorted((self.threshold, 3 * self.threshold), change * motion, side="right"))
        return place if self.inverse else 2 - place
