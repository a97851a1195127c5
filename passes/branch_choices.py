"""Turns `choose` into control flow: of two precisions only one is computed.

    before:  y₀ = choose(low₀(x), high₀(x), p);  y₁ = choose(low₁(x), high₁(x), p)
    after:   y₀, y₁ = cond(p, high, low, (x, weights …))         what both need stays in front

Values do not change. All choices of one flag, in whatever graph they stand, make one `cond`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from qc_compiler import ops
from qc_compiler.graph import (
    GraphPass,
    Report,
    cond,
    external_inputs,
    getitems,
    outline,
    separate_operands,
    separate_results,
    submodules,
    symbols_of,
)


@dataclass(frozen=True)
class BranchChoices(GraphPass):
    """After it, only `FuseEpilogues` edits the branches, and leaves what they take and return as it is."""

    def run(self, gm: fx.GraphModule) -> Report:
        changed, todo = 0, [gm, *(child for _, child in submodules(gm))]
        while todo:
            owner = todo.pop()
            while group := _next_group(owner):
                todo += _branch(owner, group, changed)
                changed += len(group)
        return Report(changed)


def _next_group(owner: fx.GraphModule) -> list[fx.Node]:
    """Returns the choices of one flag: of the last choice, since what another one chooses between stands before it."""
    choices = owner.graph.find_nodes(op="call_function", target=ops.choose)
    order = {node: i for i, node in enumerate(owner.graph.nodes)}
    last = max(choices, key=order.__getitem__, default=None)
    return [node for node in choices if last is not None and node.args[2] is last.args[2]]


def _branch(owner: fx.GraphModule, group: Sequence[fx.Node], number: int) -> list[fx.GraphModule]:
    graph, flag = owner.graph, group[0].args[2]
    parts = []
    for side in (0, 1):
        results = _candidates(group, side)
        nodes = _exclusive(results, set(group))
        parts.append(separate_operands(separate_results(nodes, results), ()))
    lows, highs = _candidates(group, 0), _candidates(group, 1)
    operands = list(dict.fromkeys([*external_inputs(parts[0]), *external_inputs(parts[1])]))
    operands += symbols_of(graph, operands)
    branches = [outline(parts[1], operands, highs), outline(parts[0], operands, lows)]
    names = [f"choice_{number}_{side}" for side in ("high", "low")]
    for name, branch in zip(names, branches):
        owner.add_submodule(name, branch)
    with graph.inserting_before(group[0]):
        attrs = [graph.get_attr(name) for name in names]
        call = graph.call_function(cond, (flag, *attrs, tuple(operands)))
    for node, item in zip(group, getitems(call, [node.meta["val"] for node in group])):
        node.replace_all_uses_with(item)
        graph.erase_node(node)
    for nodes in parts:
        for node in reversed(nodes):
            graph.erase_node(node)
    stable_topological_sort(graph)
    owner.recompile()
    return branches


def _candidates(group: Sequence[fx.Node], side: int) -> list[fx.Node]:
    args: list[Any] = [node.args[side] for node in group]
    return args


def _exclusive(results: Sequence[fx.Node], group: set[fx.Node]) -> list[fx.Node]:
    """Returns what only these results are computed from, in the order of the graph; what unpacks a tuple made outside
    stays there, since operands are tensors.
    """
    found: set[fx.Node] = set()
    order = list(results[0].graph.nodes)
    for node in reversed(order):
        if node.op == "call_function" and node.users:
            ends = node in results and all(user in group or user in found for user in node.users)
            if ends or all(user in found for user in node.users):
                found.add(node)
    found -= {node for node in found if node.target is operator.getitem and node.args[0] not in found}
    return [node for node in order if node in found]
