"""The rules that decide which regions to compute: each a small pure function of earlier statistics."""

from collections.abc import Sequence
from typing import Any

from ..graph import SiteSpec
from ..options import Options
from .aigq import AIGQ
from .base import Controller, History, PrecisionRule, Step
from .dmpq import DMPQ
from .first_block import FirstBlock
from .hlc import HLC
from .magcache import MagCache
from .srap import SRAP
from .static import Static
from .tdc import TDC
from .teacache import TeaCache

__all__ = [
    "AIGQ",
    "DMPQ",
    "HLC",
    "SRAP",
    "TDC",
    "Controller",
    "FirstBlock",
    "History",
    "MagCache",
    "PrecisionRule",
    "Static",
    "Step",
    "TeaCache",
    "controller",
    "precision_rule",
    "pruning_rule",
]


def controller(options: Options) -> Controller:
    """Returns the rule that the options name, with its own defaults where they are silent."""
    given = {"threshold": options.threshold, "max_skip": options.max_skip}
    given = {name: value for name, value in given.items() if value is not None}
    match options.cache:
        case "static":
            return Static(options.interval)
        case "hlc":
            return HLC(**given)  # type: ignore[arg-type]
        case "tdc":
            return TDC(**given)  # type: ignore[arg-type]
        case "first_block":
            return FirstBlock(**given)  # type: ignore[arg-type]
        case "teacache":
            return TeaCache(**given, polynomial=options.polynomial or (1.0, 0.0))  # type: ignore[arg-type]
        case "magcache":
            return MagCache(**given, ratios=options.ratios or ())  # type: ignore[arg-type]
        case _:
            return Static(1)


def precision_rule(options: Options, sites: Sequence[SiteSpec]) -> PrecisionRule:
    """Returns the rule that chooses the precision of linears, with what calibration found out about them."""
    assert options.recipe is not None
    given: dict[str, Any] = {} if options.precision_threshold is None else {"threshold": options.precision_threshold}
    if options.recipe.rule != "dmpq":
        return AIGQ(**given, inverse=options.recipe.rule == "inverse")
    known = options.plan.quantization if options.plan else None
    if known is None:
        return DMPQ(**given)
    at = [known.index(site.name) for site in sites]
    outliers = tuple(map(bool, known.has_outliers[at])) if len(options.schemes) > 2 else ()
    given = {"threshold": known.threshold} | given
    return DMPQ(**given, alpha=tuple(known.alpha[at]), beta=tuple(known.beta[at]), outliers=outliers)


def pruning_rule(options: Options) -> SRAP:
    """Returns the rule for pruning, with its own default where the options are silent."""
    given = {"threshold": options.prune_threshold, "seed": options.prune_seed}
    return SRAP(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
