"""The passes, and THE ORDER."""

import torch

from qc_compiler.formats import parse_format
from qc_compiler.graph import GraphPass
from qc_compiler.options import Options

from .allocate_bits import AllocateBits
from .branch_choices import BranchChoices
from .compensate_output import CompensateOutput
from .fuse_epilogues import FuseEpilogues
from .guard_regions import GuardRegions
from .lower_floats import LowerFloats
from .lower_linears import LowerLinears
from .normalize import Normalize
from .prepare_weights import PrepareWeights
from .probe_first_block import ProbeFirstBlock
from .prune import Prune
from .quantize_linears import QuantizeLinears
from .rewrite_attention import RewriteAttention
from .share_bodies import ShareBodies

__all__ = [
    "AllocateBits",
    "BranchChoices",
    "CompensateOutput",
    "FuseEpilogues",
    "GuardRegions",
    "LowerFloats",
    "LowerLinears",
    "Normalize",
    "PrepareWeights",
    "ProbeFirstBlock",
    "Prune",
    "QuantizeLinears",
    "RewriteAttention",
    "ShareBodies",
    "default_pipeline",
]


def default_pipeline(options: Options, num_frames: int = 1) -> tuple[GraphPass, ...]:
    """Returns the passes for these options, in order. `exact` has none: the graph reaches Inductor as it came."""
    if options.exact:
        return ()
    return (
        # First, so that every other pass knows one small functional op set.
        Normalize(),
        # Before everything else that rewrites: each later pass then edits one body instead of every block.
        ShareBodies(),
        # As soon as there are bodies to take regions out of: nothing is then done for what leaves.
        *((Prune(options.pruned),) if options.pruned else ()),
        # Before the guards, while the first block's own nodes can still be read; only where a rule asks for it.
        *((ProbeFirstBlock(),) if options.has_probe else ()),
        # Before the quantizers, whose choices may lie in a branch that a layer of cached heads does not take.
        *((_heads(options, num_frames),) if options.attends else ()),
        # Before the quantizers: blocks whose weights get different bits cannot share a body any more.
        *((_allocation(options),) if options.recipe and options.recipe.allocated else ()),
        # The semantics first, then this device's kernels for them; both while a body is still one plain graph.
        *((_quantizers(options),) if options.recipe else ()),
        # A packed model brings its quantizers along, so these three always run.
        LowerLinears(options.emulate),
        # Behind them: only beside kernels of low precision is that of the rest lowered.
        LowerFloats(),
        PrepareWeights(),
        # What a region contains must not change any more when its branches are built.
        *((_guards(options, num_frames),) if options.caches else ()),
        # Behind the guards: slots hold what the model said, not what was corrected.
        *((CompensateOutput(),) if options.compensates else ()),
        # Late: until here a choice of precision is one plain node.
        BranchChoices(),
        # Last: guards and choices read the sums and products that disappear into a kernel here.
        FuseEpilogues(),
    )


def _heads(options: Options, num_frames: int) -> RewriteAttention:
    assert options.plan is not None
    assert options.plan.attention is not None
    return RewriteAttention(options, options.plan.attention, num_frames)


def _allocation(options: Options) -> AllocateBits:
    known = options.plan.quantization if options.plan else None
    return AllocateBits(options.bits, dict(zip(known.sites, map(int, known.bits))) if known else None)


def _quantizers(options: Options) -> QuantizeLinears:
    known = options.plan.quantization if options.plan else None
    amax = dict(zip(known.sites, map(torch.from_numpy, known.amax))) if known else {}
    return QuantizeLinears(options.schemes, options.emulate, amax)


def _guards(options: Options, num_frames: int) -> GuardRegions:
    storage = None if options.cache_dtype == "model" else parse_format(options.cache_dtype)
    return GuardRegions(options.graph_level, options.guards_output, options.depth, storage, num_frames)
