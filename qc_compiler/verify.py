"""What must be true of a graph between passes. Cheap enough to be always on."""

from typing import Any

import torch
from torch import fx

from .errors import InvariantError
from .graph import body_calls, body_of, cond, outputs, placeholders, submodules
from .show import show_type

aten = torch.ops.aten
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
}


def verify(gm: fx.GraphModule) -> None:
    """Checks a graph and everything it calls.

    Raises:
        InvariantError: naming the node: metadata is missing, a body is called with other operands than it takes,
            the branches of a `cond` disagree, or one returns its own input (invariant 3 of the design).
    """
    for name, graph_module in [("graph", gm), *submodules(gm)]:
        graph_module.graph.lint()
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                raise InvariantError(f"{name}: %{node.name} ({node.target}) has no meta['val']")
            if node.target is cond:
                _verify_cond(name, graph_module, node)
        for call in body_calls(graph_module):
            _verify_call(name, call, body_of(graph_module, call))


def _verify_call(where: str, call: fx.Node, body: fx.GraphModule) -> None:
    operands = placeholders(body.graph)
    if len(operands) != len(call.args) - 2:
        raise InvariantError(
            f"{where}: %{call.name} passes {len(call.args) - 2} operands to a body that takes {len(operands)}"
        )
    for formal, actual in zip(operands, call.args[2:]):
        expected, found = _kind(formal.meta.get("val")), _kind(actual.meta.get("val"))  # type: ignore[union-attr]
        if expected != found:
            raise InvariantError(f"{where}: %{call.name} passes %{actual} as {found}, the body takes {expected}")


def _kind(val: Any) -> str:
    layout = f" strides {tuple(val.stride())} on {val.device}" if isinstance(val, torch.Tensor) else ""
    return f"{show_type(val)}{layout}"


def _verify_cond(where: str, gm: fx.GraphModule, node: fx.Node) -> None:
    branches = [getattr(gm, attr.target) for attr in node.args[1:3]]  # type: ignore[union-attr, arg-type]
    kinds = [[_kind(result.meta["val"]) for result in outputs(branch.graph)] for branch in branches]
    if kinds[0] != kinds[1]:
        raise InvariantError(f"{where}: the branches of %{node.name} return {kinds[0]} and {kinds[1]}")
    for branch, label in zip(branches, ("true", "false")):
        for result in outputs(branch.graph):
            source = result
            while source.op == "call_function" and source.target in _VIEWS:
                source = source.args[0]
            if source.op == "placeholder":
                raise InvariantError(f"{where}: the {label} branch of %{node.name} returns its input %{source.name}")
