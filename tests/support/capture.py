"""What Dynamo hands to a backend, kept, so that passes can be run on copies of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes import Normalize, ShareBodies
from qc_compiler.backend import rewrite
from qc_compiler.costs import hint
from qc_compiler.graph import GraphPass, Report, cond, copy_of, submodules
from qc_compiler.options import parse_options
from qc_compiler.show import show
from qc_compiler.verify import verify


@dataclass(frozen=True)
class Captured:
    """One Dynamo graph and its real inputs, parameters among them."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]

    def after(self, *passes: GraphPass) -> fx.GraphModule:
        """Returns the graph after some passes, verified after each."""
        gm = copy_of(self.gm)
        for graph_pass in passes:
            apply(graph_pass, gm)
        return gm

    def normalized(self) -> fx.GraphModule:
        return self.after(Normalize())

    def shared(self) -> fx.GraphModule:
        return self.after(Normalize(), ShareBodies())

    def rewritten(self, **options: Any) -> fx.GraphModule:
        """Returns the graph after the default pipeline."""
        gm = copy_of(self.gm)
        rewrite(gm, parse_options(options))
        return gm


def apply(graph_pass: GraphPass, gm: fx.GraphModule) -> Report:
    """Runs one pass; the graph is verified before it (if it is normalized) and after it."""
    if all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function"):
        verify(gm)
    report = graph_pass.run(gm)
    verify(gm)
    gm.recompile()
    return report


def capture(model: nn.Module | Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> Captured:
    """Returns what Dynamo captures of one call."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(Captured(gm, tuple(hint(value) for value in inputs)))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (captured,) = found
    return captured


def skips(report: Report) -> list[tuple[str, str]]:
    return [(skip.where, skip.reason) for skip in report.skipped]


def branches(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """Returns the branches of every `cond` in a graph and in all that it calls."""
    owners = [gm, *(child for _, child in submodules(gm))]
    conds = [(owner, node) for owner in owners for node in owner.graph.nodes if node.target is cond]
    return [getattr(owner, attr.target) for owner, node in conds for attr in node.args[1:3]]


def text_after(graph_pass: GraphPass, gm: fx.GraphModule) -> str:
    apply(graph_pass, gm)
    return show(gm)
