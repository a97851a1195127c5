"""The rules that decide which regions to compute: each a small pure function of earlier statistics."""

from ..options import Options
from .base import Controller, History, Step
from .dmpq import DMPQ
from .first_block import FirstBlock
from .hlc import HLC
from .magcache import MagCache
from .static import Static
from .tdc import TDC
from .teacache import TeaCache

__all__ = [
    "DMPQ",
    "HLC",
    "TDC",
    "Controller",
    "FirstBlock",
    "History",
    "MagCache",
    "Static",
    "Step",
    "TeaCache",
    "controller",
    "precision_rule",
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


def precision_rule(options: Options) -> DMPQ:
    """Returns the rule that chooses the precision of linears."""
    return DMPQ() if options.precision_threshold is None else DMPQ(options.precision_threshold)
