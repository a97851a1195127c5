"""Histories for the rules, written as small tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qc_compiler.controllers import History, Step
from qc_compiler.statistics import Statistic


def history(
    computed: Sequence[Sequence[int]], num_steps: int | None = None, regions: Sequence[str] | None = None, **tables: Any
) -> History:
    """Returns the history of the step after `computed`.

    Args:
        computed: A row a step, a column a region.
        tables: Values of the statistics by their names in lower case, in the same layout; `motion` is 1 if not given.
    """
    shape = np.shape(computed)
    values = np.zeros((*shape, len(Statistic)), dtype=np.float32)
    values[..., Statistic.MOTION] = 1.0
    for name, table in tables.items():
        values[..., Statistic[name.upper()]] = table
    rows = np.array(computed, dtype=np.bool_)
    values[~rows] = 0.0
    steps = [Step(i, row, statistics) for i, (row, statistics) in enumerate(zip(rows, values))]
    return History(steps, shape[0], num_steps, tuple(regions or (f"blocks.{r}" for r in range(shape[1]))))
