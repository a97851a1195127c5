"""Moves every block into a subgraph that all blocks of the same structure share.

    before:  y₀ = block(x₀, w₀)    written out, node by node, for every block
    after:   y₀ = invoke_subgraph(body_0, x₀, w₀);  y₁ = invoke_subgraph(body_0, y₀, w₁);  …

Values do not change. Compile time no longer grows with depth, and a later pass edits each body once.
A stream that enters or leaves with unusual strides is made contiguous first: a body has one layout of its streams.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort

from qc_compiler.costs import flops_of
from qc_compiler.graph import (
    GraphPass,
    Report,
    body_calls,
    contiguous_copy,
    invoke_subgraph,
    is_plain,
    is_tensor,
    outline,
    separate_operands,
    separate_results,
    symbols_of,
    update_values,
)
from qc_compiler.regions import Block, as_block, find_blocks, structure


@dataclass(frozen=True)
class ShareBodies(GraphPass):
    """Outlines blocks. A call's `meta["block"]` names it; a body's meta says which operand is whose residual base."""

    def run(self, gm: fx.GraphModule) -> Report:
        if body_calls(gm):
            return Report(changed=0)
        found, skips = find_blocks(gm)
        bodies: dict[tuple[Any, ...], str] = {}
        for block in found:
            _fix_numbers(block)
        copies = _copy_streams(gm.graph, found)
        parts = [separate_results(b.nodes, b.outputs) for b in found]
        _drop_needless(gm.graph, copies)
        blocks = [as_block(b.name, nodes) for b, nodes in zip(found, parts)]
        parts = [separate_operands(b.nodes, {base for base in b.bases if base is not None}) for b in blocks]
        blocks = [as_block(b.name, nodes) for b, nodes in zip(blocks, parts)]
        blocks = [replace(b, inputs=(*b.inputs, *symbols_of(gm.graph, b.inputs))) for b in blocks]
        keys = [structure(block) for block in blocks]
        for key, block in zip(keys, blocks):
            if key not in bodies:
                bodies[key] = f"body_{len(bodies)}"
                gm.add_submodule(bodies[key], _body(block))
        for key, block in reversed(list(zip(keys, blocks))):  # from the end: what a block reads is still in place
            _call(gm, block, bodies[key])
        stable_topological_sort(gm.graph)
        return Report(changed=len(blocks), skipped=tuple(skips))


def _fix_numbers(block: Block) -> None:
    """Makes the symbolic floats that a block reads constants, guarded by Dynamo: no operand can be one.

    With `dynamic=True` Dynamo makes a symbol of every float attribute of a module.
    """
    inside = set(block.nodes)
    for number in block.inputs:
        if isinstance(number.meta.get("val"), torch.SymFloat):
            constant = float(number.meta["val"])
            for user in [user for user in number.users if user in inside]:
                user.args = fx.map_arg(user.args, lambda arg: constant if arg is number else arg)  # noqa: B023
                user.kwargs = fx.map_arg(user.kwargs, lambda arg: constant if arg is number else arg)  # noqa: B023


def _copy_streams(graph: fx.Graph, blocks: Sequence[Block]) -> list[fx.Node]:
    """Makes the streams that enter blocks with unusual strides contiguous; returns the copies."""
    copies = []
    for block in blocks:
        inside = set(block.nodes)
        for base in {base for base in block.bases if base is not None and not is_plain(base.meta["val"])}:
            with graph.inserting_before(min(user for user in base.users if user in inside)):
                copies.append(contiguous_copy(graph, base))
            base.replace_all_uses_with(copies[-1], lambda user: user in inside)  # noqa: B023
    update_values(graph, copies)
    return copies


def _drop_needless(graph: fx.Graph, copies: Sequence[fx.Node]) -> None:
    """Removes copies of what is contiguous by now: once the first block's stream is, so are most others."""
    sources = {copy: copy.all_input_nodes[0] for copy in copies}
    needless = {copy: source for copy, source in sources.items() if is_plain(source.meta["val"])}
    for copy, source in needless.items():
        copy.replace_all_uses_with(source)
        graph.erase_node(copy)
    update_values(graph, needless.values())


def _body(block: Block) -> fx.GraphModule:
    body = outline(block.nodes, block.inputs, block.outputs)
    body.meta["bases"] = tuple(None if b is None else block.inputs.index(b) for b in block.bases)
    body.meta["flops"] = flops_of(body)
    return body


def _call(gm: fx.GraphModule, block: Block, body: str) -> None:
    graph = gm.graph
    with graph.inserting_after(block.nodes[-1]):
        attr = graph.get_attr(body)
    attr.meta["val"] = None
    with graph.inserting_after(attr):
        call = graph.call_function(invoke_subgraph, (attr, body, *block.inputs))
    call.meta["val"] = tuple(node.meta["val"] for node in block.outputs)
    call.meta["block"] = block.name
    inside = set(block.nodes)
    last = call
    for i, result in enumerate(block.outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, i))
        last.meta["val"] = result.meta["val"]
        result.replace_all_uses_with(last, lambda user: user not in inside)
    for node in reversed(block.nodes):
        graph.erase_node(node)
    assert all(is_tensor(node) for node in call.users)
