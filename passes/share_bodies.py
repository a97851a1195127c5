"""Moves every block into a subgraph that all blocks of the same structure share.

    before:  y₀ = block(x₀, w₀)    written out, node by node, for every block
    after:   y₀ = invoke_subgraph(body_0, x₀, w₀);  y₁ = invoke_subgraph(body_0, y₀, w₁);  …

Values do not change. Compile time no longer grows with depth, and a later pass edits each body once.
A stream that enters with unusual strides is made contiguous first: a body has one layout of operands.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qc_compiler.cost import flops_of
from qc_compiler.graph import (
    GraphPass,
    Report,
    body_calls,
    invoke_subgraph,
    is_tensor,
    outline,
    separate_operands,
)
from qc_compiler.regions import Block, as_block, find_blocks, structure


@dataclass(frozen=True)
class ShareBodies(GraphPass):
    """Outlines blocks. A call's `meta["block"]` names it; a body's meta says which operand is whose residual base."""

    def run(self, gm: fx.GraphModule) -> Report:
        if body_calls(gm):
            return Report(changed=0)
        blocks, skips = find_blocks(gm)
        bodies: dict[tuple[Any, ...], str] = {}
        for block in blocks:
            _make_streams_contiguous(gm.graph, block)
        blocks = [as_block(b.name, separate_operands(b.nodes, {x for x in b.bases if x})) for b in find_blocks(gm)[0]]
        keys = [structure(block) for block in blocks]
        for key, block in zip(keys, blocks):
            if key not in bodies:
                bodies[key] = f"body_{len(bodies)}"
                gm.add_submodule(bodies[key], _body(block))
        for key, block in reversed(list(zip(keys, blocks))):  # from the end: what a block reads is still in place
            _call(gm, block, bodies[key])
        return Report(changed=len(blocks), skipped=tuple(skips))


def _make_streams_contiguous(graph: fx.Graph, block: Block) -> None:
    inside = set(block.nodes)
    for base in {base for base in block.bases if base is not None}:
        if base.meta["val"].is_contiguous():
            continue
        with graph.inserting_after(base):
            copy = graph.call_function(
                torch.ops.aten.clone.default, (base,), {"memory_format": torch.contiguous_format}
            )
        copy.meta["val"] = torch.ops.aten.clone.default(base.meta["val"], memory_format=torch.contiguous_format)
        base.replace_all_uses_with(copy, lambda user: user in inside)


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
