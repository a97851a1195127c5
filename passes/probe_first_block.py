"""Adds the modulated input of the first block as a region `probe` that is always computed: TeaCache's signal.

    before:  y = body_0(x, temb, …)
    after:   m = norm(x)·(1 + scale) + shift, computed again outside, its change since the last step a statistic

The cost is one norm and one modulation; no value of the model changes.
"""

from dataclasses import dataclass

import torch
from torch import fx

from qc_compiler.graph import GraphPass, Report, Skip, body_calls, body_of, is_parameter, placeholders
from qc_compiler.regions import is_attention


@dataclass(frozen=True)
class ProbeFirstBlock(GraphPass):
    """Marks the probe for the guard pass: `gm.meta["probe"]` is the node of m in the main graph."""

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if not calls or "probe" in gm.meta:
            return Report(changed=0)
        call = calls[0]
        body = body_of(gm, call)
        base = next(b for b in body.meta["bases"] if b is not None)
        found = _modulated_input(body, placeholders(body.graph)[base])
        if found is None:
            return Report(
                0,
                (Skip(str(call.meta["block"]), "no linear reads a function of its stream before attention"),),
            )
        copies = dict(zip(placeholders(body.graph), call.args[2:]))
        cone = _ancestors(found)
        with gm.graph.inserting_before(call):
            for node in body.graph.nodes:
                if node in cone:
                    copies[node] = gm.graph.node_copy(node, lambda old: copies[old])
        gm.meta["probe"] = copies[found]
        return Report(changed=1)


def _modulated_input(body: fx.GraphModule, stream: fx.Node) -> fx.Node | None:
    """Returns what the first linear reads that depends on the stream."""
    from_stream = {stream}
    for node in body.graph.nodes:
        if node.op == "call_function" and any(arg in from_stream for arg in node.all_input_nodes):
            if is_attention(node):
                return None
            if node.target is torch.ops.aten.linear.default and node.args[0] is not stream:
                return node.args[0]
            from_stream.add(node)
    return None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current.op == "call_function" and current not in found and not is_parameter(current):
            found.add(current)
            todo += current.all_input_nodes
    return found
