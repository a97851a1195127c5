"""Fits the rules that need numbers of the model: TeaCache's polynomial, MagCache's ratios."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import OptionError, QuantCacheError, nearest
from ..registry import runtime_of
from ..statistics import Statistic
from ..trajectory_summary import summarize
from .recording import compile_static

DEGREE = 4  # of TeaCache's polynomial, as in its paper


def fit_rule(
    model: Any, generate: Callable[[Any], Any], rule: str, *, backend: Any = "quantcache"
) -> dict[str, tuple[float, ...] | str]:
    """Measures one full trajectory and returns the options of a rule fitted to it.

    Args:
        model: Plain or compiled.
        generate: The user's sampling function, as for `calibrate`.
        rule: `teacache` or `magcache`.
        backend: What compiles the model; tests pass one without Inductor.

    Returns:
        Options for `torch.compile`: `polynomial` or `ratios`, with `cache` and `level`.

    Raises:
        OptionError: the rule needs no fit.
        QuantCacheError: `generate` ran too few steps.
    """
    if rule not in ("teacache", "magcache"):
        raise OptionError(f"rule={rule!r} needs no fit: {nearest(rule, ('teacache', 'magcache'))}")
    options: dict[str, Any] = {"cache": rule, "level": "network", "threshold": 0.0, "strict": True}
    compiled = compile_static(getattr(model, "_orig_mod", model), backend, options)
    generate(compiled)
    runtime_of(compiled).reset()
    generate(compiled)
    measured = summarize(compiled)
    names = [region.name for region in measured.regions]
    rows = measured.streams[0].statistics  # (N, R, statistics): at threshold 0 every step was computed
    if len(rows) <= DEGREE + 1:
        raise QuantCacheError(f"generate(model) took {len(rows)} steps of the model: expected more than {DEGREE + 1}")
    network = rows[1:, names.index("network")]
    if rule == "magcache":
        return {"cache": rule, "level": "network", "ratios": (1.0, *map(float, network[:, Statistic.MAGNITUDE]))}
    probe = rows[1:, names.index("probe"), Statistic.CHANGE]
    polynomial = np.polyfit(probe, network[:, Statistic.CHANGE], DEGREE)
    return {"cache": rule, "level": "network", "polynomial": tuple(map(float, polynomial))}
