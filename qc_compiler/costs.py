"""What a graph costs: floating point operations and bytes moved, as expressions in its sizes.

Inductor fuses, so bytes are counted kernel by kernel:

    dense      an op with FLOPs (linear, convolution, product, attention) is a kernel of its own
    pointwise  all other ops that read each other, with no dense op on the way, are one kernel: norm and modulation,
               gate and residual, GELU; each op is computed as late as what reads it allows
    bytes      a kernel reads every tensor that enters it once and writes every tensor that leaves it once; views are
               free, elements that a broadcast repeats count once, and a lookup reads what it returns

FLOPs are torch's: a multiply–add counts two, pointwise ops none.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .graph import args_of, fake_mode_of, is_symbolic_number, is_tensor, placeholders, storages_of

aten = torch.ops.aten

_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_SPECIAL = {"gelu", "silu", "sigmoid", "tanh", "exp", "erf", "softmax", "_softmax", "sin", "cos", "log", "pow"}


@dataclass(frozen=True)
class Kernel:
    """One kernel; its numbers are expressions in symbolic sizes.

    Attributes:
        kind: `linear`, `convolution`, `attention`, `bf16 attention` or `pointwise`; a quantized linear has the name of
            its scheme.
        dtype: Of its result.
        flops: Floating point operations.
        bytes_moved: What it reads and writes.
        shape: Rows, inner and outer size of a product; queries, keys and head width of attention; else empty.
        num_special: Elements that a transcendental function is taken of.
        linear: Module path, of a linear that quantization takes; else empty.
        beside: Scheme of the linears beside attention of another kind; else empty.
    """

    kind: str
    dtype: torch.dtype
    flops: Expr
    bytes_moved: Expr
    shape: tuple[Expr, ...] = ()
    num_special: Expr = sympy.S.Zero
    linear: str = ""
    beside: str = ""


def flops_of(gm: fx.GraphModule) -> float:
    """Counts the floating point operations of one run of a graph, symbolic sizes at their hints.

    Source: torch's FlopCounterMode, run over fake tensors; nothing is computed and no guard is added.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, flop_counter() as counter:
        inputs = [_concrete(node.meta["val"], mode) for node in placeholders(gm.graph)]
        fx.Interpreter(gm).run(*inputs)
    return float(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter, which by itself (2.13) knows no formula for attention on a CPU and counts none."""
    cpu_attention = aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(
        display=False, custom_mapping={cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    )


def _concrete(val: Any, mode: FakeTensorMode) -> Any:
    if isinstance(val, torch.Tensor):
        size, stride = ([hint(n) for n in numbers] for numbers in (val.shape, val.stride()))
        with mode:
            return torch.empty_strided(size, stride, dtype=val.dtype, device=val.device)
    return hint(val)


def hint(number: Any) -> Any:
    """Returns the value a symbolic number had when the graph was traced; any other number as it is."""
    return number.node.hint if isinstance(number, (torch.SymInt, torch.SymFloat)) else number


def expression(number: Any) -> Expr:
    """Returns an integer, symbolic or not, as an expression."""
    return number.node.expr if isinstance(number, torch.SymInt) else sympy.Integer(number)


def tensor_bytes(val: Tensor) -> Expr:
    """Returns the bytes of a tensor; elements that a broadcast repeats are counted once.

    >>> tensor_bytes(torch.empty(2, 3)), tensor_bytes(torch.empty(2, 1).expand(2, 3))
    (24, 8)
    """
    sizes = [
        expression(n) for n, stride in zip(val.shape, val.stride()) if not (isinstance(stride, int) and stride == 0)
    ]
    return sympy.prod(sizes) * val.dtype.itemsize


def find_kernels(nodes: Sequence[fx.Node], quantizable: Mapping[fx.Node, str] | None = None) -> tuple[Kernel, ...]:
    """Returns the kernels that compute `nodes` (in the order of their graph), whatever else reads or makes them.

    Args:
        nodes: Of one graph.
        quantizable: Those of the linears among them that quantization takes, with their module paths.
    """
    nodes = [node for node in nodes if node.op == "call_function" and not is_symbolic_number(node)]
    roots: dict[fx.Node, fx.Node] = {}  # of each node the one that owns its memory
    for node in nodes:
        source = next((arg for arg in node.all_input_nodes if _is_view(node, arg)), None)
        roots[node] = node if source is None else roots.get(source, source)
    owners = [node for node in nodes if roots[node] is node]
    flops = {node: _flops(node) for node in owners}
    groups = _fused(nodes, roots, {node for node in owners if flops[node] != 0})
    return tuple(_kernel(group, roots, sum(flops[n] for n in group), quantizable or {}) for group in groups)


def _is_view(node: fx.Node, arg: fx.Node) -> bool:
    return node.target is operator.getitem or bool(storages_of(node.meta.get("val")) & storages_of(arg.meta.get("val")))


def _flops(node: fx.Node) -> Expr:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    tensors = [arg.meta["val"] for arg in node.all_input_nodes if is_tensor(arg)]
    if not tensors:
        return sympy.S.Zero
    with fake_mode_of(tensors), torch.no_grad(), flop_counter() as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return expression(counter.get_total_flops())


def _fused(nodes: Sequence[fx.Node], roots: dict[fx.Node, fx.Node], dense: set[fx.Node]) -> list[list[fx.Node]]:
    """Returns the nodes that own memory, kernel by kernel.

    Levels grow along every path that leads through a dense op, so no such path leads from a kernel back into it.
    """
    level: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        level[node] = min((level[user] for user in node.users if user in level), default=0) - (node in dense)
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if roots[node] is not node:
            continue
        group_of[node] = [node]
        for source in [roots.get(arg, arg) for arg in node.all_input_nodes if node not in dense]:
            joins = source not in dense and level.get(source) == level[node]
            if joins and group_of[source] is not group_of[node]:
                group_of[source] += group_of[node]
                group_of |= dict.fromkeys(group_of[source], group_of[source])
    return list({id(group): group for group in group_of.values()}.values())


def _kernel(
    group: Sequence[fx.Node], roots: dict[fx.Node, fx.Node], flops: Expr, quantizable: Mapping[fx.Node, str]
) -> Kernel:
    inside = set(group)
    reads: dict[Any, Tensor] = {}
    for node in group:
        for arg in node.all_input_nodes:
            if roots.get(arg, arg) not in inside and is_tensor(arg):
                looks_up = node.target in _LOOKUPS and arg is node.args[0]
                reads[(arg, node) if looks_up else arg] = (node if looks_up else arg).meta["val"]
    views = {node for node, root in roots.items() if root in inside and root is not node}
    written = {
        roots[node] for node in inside | views if any(user not in inside and user not in views for user in node.users)
    }
    results = [val for node in group if node in written for val in _tensors(node)]
    num_bytes = sum(map(tensor_bytes, (*reads.values(), *results)), start=sympy.S.Zero)
    special = [tensor_bytes(n.meta["val"]) / n.meta["val"].dtype.itemsize for n in group if _is_special(n)]
    last = group[-1]
    kind = _kind(last) if flops != 0 else "pointwise"
    shape = _shape(last, flops) if flops != 0 else ()
    dtype = _tensors(last)[0].dtype
    return Kernel(kind, dtype, flops, num_bytes, shape, sum(special, start=sympy.S.Zero), quantizable.get(last, ""))


def _tensors(node: fx.Node) -> list[Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, Tensor)]


def _is_special(node: fx.Node) -> bool:
    return is_tensor(node) and not _SPECIAL.isdisjoint(str(node.target).split("."))


def _kind(node: fx.Node) -> str:
    if node.target in _CONVOLUTIONS:
        return "convolution"
    return "attention" if "attention" in str(node.target) else "linear"


def _shape(node: fx.Node, flops: Expr) -> tuple[Expr, ...]:
    """Returns what the speed of a dense op depends on, as of `Kernel.shape`."""
    result = _tensors(node)[0]
    if _kind(node) == "attention":
        query, key = (arg.meta["val"].shape for arg in args_of(node)[:2])
        return expression(query[-2]), expression(key[-2]), expression(query[-1])
    num_elements = expression(result.numel())
    outer = expression(result.shape[1 if node.target in _CONVOLUTIONS else -1])
    return sympy.cancel(num_elements / outer), sympy.cancel(flops / (2 * num_elements)), outer
