"""Gives what follows a linear to the Triton kernel that computes it: its activation, gate and residual.

    before:  y = triton_linear(q, …, b);  z = residual + gate·gelu(y)              any of the three, in this order
    after:   z = triton_linear(q, …, b, activation, gate, residual)                one pass over memory instead of two

Error: y, gelu(y) and the product are not rounded to the model's dtype any more; the result is closer to the exact one.
Other kernels leave their epilogue to Inductor, so a graph without this one does not change.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qc_compiler.graph import GraphPass, Report, Skip, add_call, is_plain, is_tensor, module_path, submodules

aten = torch.ops.aten
_ACTIVATIONS = {aten.gelu.default: "gelu", aten.silu.default: "silu"}
_FOLLOWING = {*_ACTIVATIONS, aten.mul.Tensor, aten.add.Tensor}
_EPILOGUE = {"activation", "gate", "residual"}


@dataclass(frozen=True)
class Epilogue:
    """What follows one linear.

    Attributes:
        linear: The kernel's node.
        last: The node whose value the kernel is to return.
        activation: As the kernel names it, or `none`.
        gate: Rows that multiply it, or None.
        residual: What is added last, or None.
    """

    linear: fx.Node
    last: fx.Node
    activation: str
    gate: fx.Node | None
    residual: fx.Node | None


@dataclass(frozen=True)
class FuseEpilogues(GraphPass):
    """Behind the guards and choices: they must see a residual sum as a node of its own."""

    def run(self, gm: fx.GraphModule) -> Report:
        changed, skips = 0, []
        for owner in (gm, *(child for _, child in submodules(gm))):
            for linear in (linears := _linears(owner.graph)):
                found = find_epilogue(linear)
                if isinstance(found, Epilogue):
                    _rewrite(found)
                    changed += 1
                elif found:
                    skips.append(Skip(module_path(linear), found))
            if linears:
                owner.recompile()
        return Report(changed, tuple(skips))


def _linears(graph: fx.Graph) -> list[fx.Node]:
    """Returns the linears in the Triton kernel, by name: where Triton is not installed there are none."""
    named = [node for node in graph.nodes if str(node.target) == "quantcache.triton_linear.default"]
    return [node for node in named if _EPILOGUE.isdisjoint(_arguments(node))]


def find_epilogue(linear: fx.Node) -> Epilogue | str:
    """Returns what the kernel can compute behind a linear, or why it leaves that; '' where nothing follows."""
    following = [user for user in linear.users if user.target in _FOLLOWING]
    if len(linear.users) > 1:
        return f"its result has {len(linear.users)} uses" if following else ""
    last, activation = linear, "none"
    gate: fx.Node | None = None
    residual: fx.Node | None = None
    if (user := _next(last)) and user.target in _ACTIVATIONS:
        last, activation = user, _ACTIVATIONS[user.target] + ("_tanh" if "tanh" in user.kwargs.values() else "")
    if (user := _next(last)) and user.target is aten.mul.Tensor and is_gate(_other(user, last), last):
        last, gate = user, _other(user, last)
    if (user := _next(last)) and user.target is aten.add.Tensor and is_residual(_other(user, last), last):
        last, residual = user, _other(user, last)
    if last is linear:
        return f"{following[0].target} with these operands is none of the kernel's" if following else ""
    if not is_plain(last.meta["val"]):
        return "what follows it has other strides than a new tensor"
    return Epilogue(linear, last, activation, gate, residual)


def is_gate(other: Any, y: fx.Node) -> bool:
    """Whether y (…, N) is multiplied by rows (N,), each for as many rows of y that follow one another."""
    if not _is_operand(other, y) or other.meta["val"].dim() > y.meta["val"].dim():
        return False
    rows, shape = list(other.meta["val"].shape), y.meta["val"].shape
    rows = [1] * (len(shape) - len(rows)) + rows
    while len(rows) > 1 and _is_equal(rows[0], shape[0]):
        rows, shape = rows[1:], shape[1:]
    return _is_equal(rows[-1], shape[-1]) and all(_is_equal(size, 1) for size in rows[:-1])


def is_residual(other: Any, y: fx.Node) -> bool:
    return _is_operand(other, y) and _is_shaped_like(other, y)


def _rewrite(found: Epilogue) -> None:
    given, last = _arguments(found.linear), found.last
    operands = [given[name] for name in ("x", "x_scale", "x_zero", "weight", "form")]
    epilogue = (given.get("bias"), found.activation, found.gate, found.residual)
    with last.graph.inserting_before(last):
        result = add_call(last.graph, found.linear.target, (*operands, last.meta["val"].dtype, *epilogue))
    result.meta["nn_module_stack"] = found.linear.meta.get("nn_module_stack")
    last.replace_all_uses_with(result)
    for node in _between(found.linear, last):
        node.graph.erase_node(node)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Returns the chain of only users from `first` to `last`, the last one first."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    return chain[::-1]


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args)) | node.kwargs


def _next(node: fx.Node) -> fx.Node | None:
    """Returns the only user of a node, if it makes a tensor of the same shape."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_tensor(users[0]) and _is_shaped_like(users[0], node) else None


def _other(user: fx.Node, node: fx.Node) -> Any:
    """Returns the operand of a product or a sum beside `node`; None where they are scaled (`alpha`)."""
    if user.kwargs:
        return None
    return user.args[1] if user.args[0] is node else user.args[0]


def _is_operand(other: Any, y: fx.Node) -> bool:
    return isinstance(other, fx.Node) and other is not y and is_tensor(other) and other.meta["val"].is_floating_point()


def _is_shaped_like(node: fx.Node, like: fx.Node) -> bool:
    sizes, wanted = node.meta["val"].shape, like.meta["val"].shape
    return len(sizes) == len(wanted) and all(map(_is_equal, sizes, wanted))


def _is_equal(size: Any, wanted: Any) -> bool:
    return statically_known_true(operator.eq(size, wanted))
