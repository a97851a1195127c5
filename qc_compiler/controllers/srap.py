"""SRAP, which blocks to leave out of a step. Source: QuantCache, arXiv 2503.06545, Eq. 9–11.

    S = cos(x, y)                             of a block's input and output, at its last computed step
    pruned        if S > τ_high
    pruned with   P = P_base · 2·V̄ / (V̄ + V)  if τ_low < S ≤ τ_high;  V: its last change a step, V̄: their mean

so that stillness raises the probability and motion lowers it. The paper compares the outputs of adjacent layers, of
which the later is not known before it is computed; ours is the block's own pair of the last computed step. In a plain
stack the input is the output of the neighbour before; where kinds of blocks alternate it is that of the other kind, so
that S leaves out what the other kind changed: our choice, since it says what pruning this block would do. The paper
gives no threshold.
"""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic
from .base import History, per_region


@dataclass(frozen=True)
class SRAP:
    """Prunes redundant blocks at steps that are computed. Frozen, without state, like a `Controller`.

    Attributes:
        threshold: τ_high; τ_low is four times as far from 1.
        base: P_base, the probability at a block's usual change.
        max_skip: Most computed steps in a row at which a block is pruned; it is measured anew then.
        seed: Of the random choice.
    """

    threshold: float = 0.995
    base: float = 0.5
    max_skip: int = 4
    seed: int = 0

    def decide(self, history: History) -> NDArray[np.bool_]:
        """Returns bool (R,): which regions to leave out of this step, if it is computed."""
        if history.near_end(2):
            return np.zeros(len(history.regions), dtype=np.bool_)
        return per_region(history, [self._prunes(history, r) for r in range(len(history.regions))])

    def _prunes(self, history: History, region: int) -> bool:
        name, computed = history.regions[region], history.computed_at(region)
        if name in ("output", "probe", "network") or not computed:
            return False
        since = [step for step in history.steps if step.index > computed[-1].index and step.pruned is not None]
        if sum(bool(step.pruned[region]) for step in since) >= self.max_skip:  # type: ignore[index]
            return False
        similarity = float(np.minimum(computed[-1].statistics[region, Statistic.COSINE], 1.0))  # rounding exceeds 1
        if similarity > self.threshold:
            return True
        within = similarity > 1 - 4 * (1 - self.threshold)
        return within and _uniform(self.seed, history.index, name) < self._probability(history, region)

    def _probability(self, history: History, region: int) -> float:
        changes = [
            float(step.statistics[region, Statistic.CHANGE]) / (step.index - before.index)
            for before, step in itertools.pairwise(history.computed_at(region))
        ]
        total = sum(changes) + len(changes) * changes[-1] if changes else 0.0  # n·(V̄ + V)
        return self.base * 2 * sum(changes) / total if total != 0 else self.base


def _uniform(seed: int, step: int, region: str) -> float:
    """Returns a number in [0, 1), the same in every process.

    >>> round(_uniform(0, 3, "blocks.1"), 4)
    0.9544
    """
    digest = hashlib.sha256(f"{seed} {step} {region}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
