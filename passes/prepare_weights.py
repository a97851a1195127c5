"""Moves what is made of weights alone out of the graph: it runs once for every version of the weights.

    before:  codes, scales = quantize(w);  y = body_0(x, codes, scales)      at every step
    after:   y = body_0(x, prepared_0, prepared_1)                           and beside it
             prepare(w) → (codes, scales)                                    `gm.meta["prepare"]`

Values do not change. Only what quantization added is moved; what the model itself computes from its parameters stays.
"""

from dataclasses import dataclass

from torch import fx

from qc_compiler.graph import (
    GraphPass,
    Report,
    add_placeholder,
    eliminate_dead_code,
    is_parameter,
    is_tensor,
    outline,
    placeholders,
)


@dataclass(frozen=True)
class PrepareWeights(GraphPass):
    """`gm.meta["prepare"]` is the part that was moved; its meta says which inputs of the graph it takes, and how
    many there are before its results."""

    def run(self, gm: fx.GraphModule) -> Report:
        marked = [node for node in gm.graph.nodes if node.meta.get("prepared") and node.op == "call_function"]
        cones = {node: _cone(node) for node in marked}
        constant = [node for node in marked if all(map(is_parameter, _leaves(cones[node])))]
        inside = {node for result in constant for node in cones[result]}
        results = [node for node in constant if any(user not in inside for user in node.users)]
        if not results:
            return Report(changed=0)
        nodes = [node for node in gm.graph.nodes if node in inside]
        formals = placeholders(gm.graph)
        sources = [node for node in formals if any(user in inside for user in node.users)]
        prepare = outline(nodes, sources, results)
        eliminate_dead_code(prepare.graph)
        prepare.recompile()
        prepare.meta["sources"] = [formals.index(node) for node in sources]
        prepare.meta["at"] = len(formals)
        gm.meta["prepare"] = prepare
        for i, result in enumerate(results):
            result.replace_all_uses_with(add_placeholder(gm.graph, f"prepared_{i}", result.meta["val"]))
        for node in reversed(nodes):
            gm.graph.erase_node(node)
        return Report(changed=len(results))


def _cone(node: fx.Node) -> set[fx.Node]:
    """Returns what a node is computed from, itself and constants included, without inputs of the graph."""
    found, todo = set(), [node]
    while todo:
        current = todo.pop()
        is_constant = current.op == "get_attr" and is_tensor(current)
        if current not in found and (current.op == "call_function" or is_constant):
            found.add(current)
            todo += current.all_input_nodes
    return found


def _leaves(cone: set[fx.Node]) -> set[fx.Node]:
    return {arg for node in cone for arg in node.all_input_nodes} - cone
