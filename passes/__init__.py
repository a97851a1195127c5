"""The passes, and THE ORDER."""

from qc_compiler.graph import GraphPass
from qc_compiler.options import CACHE_DTYPES, Options

from .guard_regions import GuardRegions
from .normalize import Normalize
from .probe_first_block import ProbeFirstBlock
from .share_bodies import ShareBodies

__all__ = ["GuardRegions", "Normalize", "ProbeFirstBlock", "ShareBodies", "default_pipeline"]


def default_pipeline(options: Options, num_frames: int = 1) -> tuple[GraphPass, ...]:
    """Returns the passes for these options, in order. `exact` has none: the graph reaches Inductor as it came."""
    if options.exact:
        return ()
    return (
        # First, so that every other pass knows one small functional op set.
        Normalize(),
        # Before the guards: each later pass then edits one body instead of every block.
        ShareBodies(),
        # Before the guards, while the first block's own nodes can still be read; only where a rule asks for it.
        *((ProbeFirstBlock(),) if options.cache == "teacache" and options.plan is None else ()),
        # Last: what a region contains must not change any more when its branches are built.
        GuardRegions(
            options.graph_level,
            options.guards_output,
            options.depth,
            CACHE_DTYPES[options.cache_dtype],
            num_frames,
        ),
    )
