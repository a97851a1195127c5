"""What a rule sees, and what it returns."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistic


@dataclass(frozen=True)
class Step:
    """One earlier step of a stream.

    Attributes:
        index: Number of the step in its trajectory, from 0.
        computed: bool (R,): which regions were computed.
        statistics: float32 (R, len(Statistic)); a row holds zeros where its region was not computed.
        pruned: bool (R,): which were left out; the others were reused. Rules for caching see these as computed, with
            the statistics they had when they last were; None stands for no region.
    """

    index: int
    computed: NDArray[np.bool_]
    statistics: NDArray[np.float32]
    pruned: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class History:
    """The earlier steps of one stream and the step to decide.

    Attributes:
        steps: Oldest first; never empty (the runtime computes everything at the first step by itself).
        index: Number of the step to decide.
        num_steps: Length of the trajectory, or None if it is not known yet.
        regions: Names of the regions.
        timesteps: Of the earlier steps and of this one, if the model has any.
    """

    steps: Sequence[Step]
    index: int
    num_steps: int | None
    regions: Sequence[str]
    timesteps: Sequence[float | None] = ()

    @property
    def in_blocks(self) -> NDArray[np.bool_]:
        """bool (R,): which regions do the model's work; `output` and `probe` only observe it."""
        return np.array([name not in ("output", "probe") for name in self.regions], dtype=np.bool_)

    def computed_at(self, region: int) -> list[Step]:
        """Returns the steps at which a region was computed, oldest first."""
        return self._computed[region]

    @functools.cached_property
    def _computed(self) -> list[list[Step]]:
        found: list[list[Step]] = [[] for _ in self.regions]
        for step in self.steps:
            for region in np.flatnonzero(step.computed):
                found[region].append(step)
        return found

    def age(self, region: int) -> int:
        """Returns how many steps ago a region was last computed (1: at the step before this one)."""
        computed = self.computed_at(region)
        return self.index - computed[-1].index if computed else self.index + 1

    def rate(self, region: int, column: Statistic) -> float | None:
        """Returns CHANGE per step, or MAGNITUDE's ratio per step, between the last two computed steps.

        None until the region has been computed twice.
        """
        computed = self.computed_at(region)
        if len(computed) < 2:
            return None
        gap = computed[-1].index - computed[-2].index
        value = float(computed[-1].statistics[region, column])
        return value ** (1 / gap) if column == Statistic.MAGNITUDE else value / gap

    def near_end(self, count: int) -> bool:
        """Whether this is one of the last `count` steps; about that where their number is not known yet.

        It is then told by how the timestep nears 0, in even or growing steps as of most schedulers; of others (Karras)
        the end is not seen.
        """
        if self.num_steps is not None:
            return self.index >= self.num_steps - count
        known = [timestep for timestep in self.timesteps[-3:] if timestep is not None]
        if len(known) < 3:
            return False
        older, before, now = known
        fell, falls = older - before, before - now
        return fell > 0 and falls > 0.9 * fell and 0 <= now <= (count + 0.5) * falls * falls / fell


class Controller(ABC):
    """A rule. Frozen, without state: the same history gives the same decision."""

    @abstractmethod
    def decide(self, history: History) -> NDArray[np.bool_]:
        """Returns bool (R,): which regions to compute at this step."""


class PrecisionRule(ABC):
    """A rule for the precision of linears. Frozen, without state, like `Controller`."""

    @abstractmethod
    def decide(self, history: History | None, regions: Sequence[int], kept: NDArray[np.bool_]) -> NDArray[np.int_]:
        """Returns int (S,): which of its schemes each site takes, 0 for the lowest precision.

        Args:
            history: Of the stream; None at its first step.
            regions: For each site the region whose statistics speak for it.
            kept: bool (R,): whether what a region computes now will be reused.
        """


def per_region(history: History, wants: "list[bool]") -> NDArray[np.bool_]:
    return np.array(wants, dtype=np.bool_).reshape(len(history.regions))
