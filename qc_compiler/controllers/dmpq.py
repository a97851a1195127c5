"""DMPQ, which precision a linear takes at a step. Source: 6Bit-Diffusion, arXiv 2603.18742.

    E = α·Γ_{t−1} + β          predicted error of a linear; Γ = relL1(y, x) of its block at the last computed step
    INT8 if E > threshold, else NVFP4

PDR, of the same paper: noise in a cached residual is added again at every reuse, so the first computation after a
reused step is all INT8 (so is the first step, of which nothing is known), and where a residual will be reused linears
whose inputs have outliers, max|X| / mean|X| > 25, take theirs unquantized. α, β, the threshold and which inputs have
outliers come from calibration; without one α = 1, β = 0, nothing has outliers, and the threshold 0.5 is compared with Γ
itself: a start, not a measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import History, PrecisionRule

NVFP4, INT8, UNQUANTIZED = 0, 1, 2


@dataclass(frozen=True)
class DMPQ(PrecisionRule):
    """
    Attributes:
        threshold: Of the predicted error.
        alpha, beta: Of the prediction, one a site; empty for 1 and 0.
        outliers: Whether a site's input has outliers, one a site; empty for none.
    """

    threshold: float = 0.5
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()
    outliers: tuple[bool, ...] = ()

    def decide(self, history: History | None, regions: Sequence[int], kept: NDArray[np.bool_]) -> NDArray[np.int_]:
        choice = np.full(len(regions), INT8)
        for site, region in enumerate(regions):
            if self.outliers and self.outliers[site] and kept[region]:
                choice[site] = UNQUANTIZED
            elif history is not None and not self._refreshes(history, region):
                gamma = float(history.computed_at(region)[-1].statistics[region, Statistic.GAMMA])
                alpha = self.alpha[site] if self.alpha else 1.0
                beta = self.beta[site] if self.beta else 0.0
                choice[site] = NVFP4 if alpha * gamma + beta <= self.threshold else INT8
        return choice

    @staticmethod
    def _refreshes(history: History, region: int) -> bool:
        """Whether the region was reused at the last step, or never computed."""
        computed = history.computed_at(region)
        return not computed or computed[-1].index != history.index - 1
