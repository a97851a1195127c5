"""Takes out the blocks and sub-layers that a plan never computes.

    before:         y₀ = body_0(x₀, w₀);  y₁ = body_0(y₀, w₁)      body_0: h = x + f(x);  y = h + g(h)
    blocks.0:       y₁ = body_0(x₀, w₁)                            y₀ = x₀
    blocks.1/mlp:   y₀ = body_0(x₀, w₀);  y₁ = body_0_1(y₀, w₁)    body_0_1: y = x + f(x)

A stream to which nothing is added any more leaves its block as it entered. With a region leaves all that hangs on it:
its parameters, and what later passes would have made of it.

Source: SRAP of QuantCache, arXiv 2503.06545, Eq. 9–11. Which regions leave is the plan's to say.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from qc_compiler.costs import flops_of
from qc_compiler.errors import PlanError, nearest
from qc_compiler.graph import (
    GraphPass,
    Report,
    Skip,
    body_calls,
    body_of,
    drop_unused_parameters,
    eliminate_dead_code,
    outputs,
    placeholders,
    separate_arguments,
    separate_bodies,
)
from qc_compiler.regions import ADDITIONS, SubLayer, find_sublayers, layout_of, residual_chain, sublayer_names


@dataclass(frozen=True)
class Prune(GraphPass):
    """Removes regions: `gm.meta["pruned"]` names them, a body's own names the sub-layers that it lost.

    `gm.meta["unread"]` names the inputs of the graph that nothing reads any more: the weights of what left.

    Attributes:
        names: Of blocks and sub-layers, such as `blocks.3` and `blocks.5/mlp`.
    """

    names: tuple[str, ...]

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if "pruned" in gm.meta or not calls:
            return Report(changed=0)
        parts = {str(call.args[1]): _sublayers(body_of(gm, call)) for call in calls}
        self._check({str(call.meta["block"]): parts[str(call.args[1])] for call in calls})
        skips: list[Skip] = []
        gone = {call: self._leaving(gm, call, parts[str(call.args[1])], skips) for call in calls}
        gm.meta["pruned"] = tuple(name for names in gone.values() for name in names)
        read = [node for node in placeholders(gm.graph) if node.users]
        if gm.meta["pruned"]:
            _rewrite(gm, gone)
        gm.meta["unread"] = tuple(node.name for node in read if not node.users)
        return Report(changed=len(gm.meta["pruned"]), skipped=tuple(skips))

    def _check(self, blocks: Mapping[str, Mapping[str, SubLayer]]) -> None:
        valid = [*blocks, *(f"{block}/{name}" for block, sublayers in blocks.items() for name in sublayers)]
        for name in self.names:
            if name not in valid:
                raise PlanError(f"the plan prunes {name!r}, which this model does not have: {nearest(name, valid)}")

    def _leaving(
        self, gm: fx.GraphModule, call: fx.Node, sublayers: Mapping[str, SubLayer], skips: list[Skip]
    ) -> tuple[str, ...]:
        """Returns the names of what leaves with a call: the block, or some of its sub-layers."""
        block = str(call.meta["block"])
        if block in self.names and None not in body_of(gm, call).meta["bases"]:
            return (block,)
        if block in self.names:
            skips.append(Skip(block, "a result of it is no residual of what enters it"))
        named = {full: sub for name, sub in sublayers.items() if (full := f"{block}/{name}") in self.names}
        why = {name: _why_not(sub) for name, sub in named.items()}
        skips += [Skip(name, reason) for name, reason in why.items() if reason]
        return tuple(name for name, reason in why.items() if reason is None)


def _sublayers(body: fx.GraphModule) -> dict[str, SubLayer]:
    found, _ = find_sublayers(body, body.meta["bases"])
    return dict(zip(sublayer_names(found), found))


def _why_not(sub: SubLayer) -> str | None:
    for branch in sub.outputs:
        if len(branch.users) > 1:
            return "something else reads what it adds"
        (addition,) = branch.users
        if layout_of(_stream(addition, branch).meta["val"]) != layout_of(addition.meta["val"]):
            return "what it adds to is laid out otherwise than the sum"
    return None


def _stream(addition: fx.Node, branch: fx.Node) -> fx.Node:
    """Returns what a branch is added to."""
    return next(arg for arg in addition.all_input_nodes if arg is not branch)


def _rewrite(gm: fx.GraphModule, gone: Mapping[fx.Node, Sequence[str]]) -> None:
    blocks = [call for call, names in gone.items() if names == (call.meta["block"],)]
    for call in blocks:
        _forward(call, body_of(gm, call).meta["bases"])
    lost = {call: frozenset(n.partition("/")[2] for n in names) for call, names in gone.items() if call not in blocks}
    separate_bodies(gm, lost)
    passed: dict[str, tuple[int | None, ...]] = {}
    for call, names in lost.items():
        body = str(call.args[1])
        if names and body not in passed:
            passed[body] = _take_out(body_of(gm, call), names)
        if names:
            _forward(call, passed[body])
    eliminate_dead_code(gm.graph)
    left = body_calls(gm)
    if not left:
        raise PlanError("the plan prunes every block that the output depends on: leave at least one")
    for name in {str(call.args[1]) for call in gone} - {str(call.args[1]) for call in left}:
        gm.delete_submodule(name)
    drop_unused_parameters(gm)
    for call in left:
        separate_arguments(call)


def _take_out(body: fx.GraphModule, names: Collection[str]) -> tuple[int | None, ...]:
    """Removes sub-layers and the results that equal an operand now; returns for each result this operand, or None."""
    graph, sublayers = body.graph, _sublayers(body)
    for branch in [branch for name in sorted(names) for branch in sublayers[name].outputs]:
        (addition,) = branch.users
        addition.replace_all_uses_with(_stream(addition, branch))
        graph.erase_node(addition)
    eliminate_dead_code(graph)
    formals, inside = placeholders(graph), {node for node in graph.nodes if node.op == "call_function"}
    chains = [residual_chain(result, inside) for result in outputs(graph)]
    untouched = [chain and not any(node.target in ADDITIONS for node in chain) for chain in chains]
    passed = tuple(formals.index(chain[0]) if is_base else None for chain, is_base in zip(chains, untouched))
    graph.output_node().args = (tuple(r for r, operand in zip(outputs(graph), passed) if operand is None),)
    body.meta["bases"] = tuple(base for base, operand in zip(body.meta["bases"], passed) if operand is None)
    eliminate_dead_code(graph)
    body.recompile()
    body.meta |= {"pruned": tuple(sorted(names)), "flops": flops_of(body)}
    return passed


def _forward(call: fx.Node, passed: Sequence[int | None]) -> None:
    """Lets those who read a result of a call read the operand that it equals; the results left move up."""
    kept = [i for i, operand in enumerate(passed) if operand is None]
    for item in list(call.users):
        operand = passed[item.args[1]]  # type: ignore[index]
        if operand is None:
            item.args = (call, kept.index(item.args[1]))  # type: ignore[arg-type]
        else:
            item.replace_all_uses_with(call.args[2 + operand])  # type: ignore[arg-type]
            call.graph.erase_node(item)
    call.meta["val"] = tuple(call.meta["val"][i] for i in kept)
