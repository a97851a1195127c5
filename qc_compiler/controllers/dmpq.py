"""DMPQ, which precision a linear takes at a step. Source: 6Bit-Diffusion, arXiv 2603.18742.

    E = α·Γ_{t−1} + β          predicted error of a linear; Γ = relL1(y, x) of its block at the last computed step
    INT8 if E > threshold, else NVFP4

PDR, of the same paper: noise in a cached residual is added again at every reuse, so the first computation after a
reused step is all INT8; so is the first step, of which nothing is known. α and β belong to calibration; without one
they are 1 and 0, and the rule compares Γ itself. The threshold 0.5 is ours: on the trained video DiT about half of the
block computations lie above it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import History


@dataclass(frozen=True)
class DMPQ:
    """
    Attributes:
        threshold: Of the predicted error.
        alpha, beta: Of the prediction, one a site; empty for 1 and 0.
    """

    threshold: float = 0.5
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()

    def decide(self, history: History | None, regions: Sequence[int]) -> NDArray[np.int_]:
        """Returns int (S,): 1 for the high precision.

        Args:
            history: Of the stream; None at its first step.
            regions: For each site the region whose statistics speak for it.
        """
        high = np.ones(len(regions), dtype=np.int_)
        if history is None:
            return high
        for site, region in enumerate(regions):
            computed = history.computed_at(region)
            if not computed or computed[-1].index != history.index - 1:
                continue  # a refresh: all in high precision
            gamma = float(computed[-1].statistics[region, Statistic.GAMMA])
            alpha = self.alpha[site] if self.alpha else 1.0
            beta = self.beta[site] if self.beta else 0.0
            high[site] = not alpha * gamma + beta <= self.threshold
        return high
