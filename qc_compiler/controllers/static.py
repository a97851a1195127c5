"""Static interval: compute every n-th step. Source: FORA, arXiv 2407.01425."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Controller, History, per_region


@dataclass(frozen=True)
class Static(Controller):
    """Computes a region when its last computation is `interval` steps ago."""

    interval: int = 2

    def decide(self, history: History) -> NDArray[np.bool_]:
        return per_region(history, [history.age(r) >= self.interval for r in range(len(history.regions))])
