"""Brings a Dynamo graph to functional pre-dispatch ATen, the one small op set that every later pass knows.

    before:  h = torch.nn.functional.layer_norm(x);  h *= 1 + scale;  torch._C._nn.linear(h, w, b)
    after:   layer_norm(x) → mul → linear: no node mutates anything, linear, attention and norm stay whole

Values do not change: the ops are the ones PyTorch itself would dispatch to, and the casts that an autocast around the
call makes become nodes. Symbolic sizes survive, computed from those of the inputs: read from a tensor inside a block
they would tie other blocks to it. `view`s remain as pure nodes; since nothing is mutated any more, that they alias
cannot be observed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._functorch._aot_autograd.functional_utils import has_data_mutation
from torch.utils._sympy.functions import CleanDiv, FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from qc_compiler.costs import expression
from qc_compiler.errors import UnsupportedModelError
from qc_compiler.graph import GraphPass, Report, is_symbolic_number, placeholders, trace
from qc_compiler.show import show

_ARITHMETIC = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer, FloorDiv, CleanDiv)


@dataclass(frozen=True)
class Normalize(GraphPass):
    """Replaces the graph by its functional ATen trace; module stacks and names of parameters are kept.

    Raises:
        UnsupportedModelError: the model writes into one of its inputs or buffers, which no pure function can do.
    """

    def run(self, gm: fx.GraphModule) -> Report:
        before = show(gm)
        operands = placeholders(gm.graph)
        inputs = [node.meta["val"] if "val" in node.meta else node.meta["example_value"] for node in operands]
        names = gm.meta.get("dynamo_flat_name_to_original_fqn", {})

        def run(*args: Any) -> Any:
            result = fx.Interpreter(gm).run(*args)
            for node, arg in zip(operands, args):
                if isinstance(arg, torch.Tensor) and has_data_mutation(arg):
                    raise UnsupportedModelError(
                        f"the model writes into its input or buffer {node.target!r}; quantcache needs a pure function"
                    )
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)

        traced = trace(run, *inputs)
        _write_out_casts(traced)
        _take_sizes_from_inputs(traced)
        for old, new in zip(operands, placeholders(traced.graph)):
            new.meta["parameter"] = new.meta.get("parameter") or _is_parameter(old)
            new.meta["source"] = names.get(old.target, old.meta.get("source", str(old.target)))
            new._rename(str(old.target))
            new.target = str(old.target)
        gm.graph = traced.graph
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                setattr(gm, node.target, getattr(traced, node.target))
        return Report(changed=0 if show(gm) == before else sum(n.op == "call_function" for n in gm.graph.nodes))


def _is_parameter(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return bool(node.meta.get("parameter")) or static or isinstance(value, torch.nn.Parameter)


def _take_sizes_from_inputs(gm: fx.GraphModule) -> None:
    inputs = {node.meta["val"].node.expr: fx.Proxy(node) for node in placeholders(gm.graph) if is_symbolic_number(node)}
    sizes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    made: dict[Any, fx.Node] = {}
    for node in sizes:
        expr = expression(node.meta["val"])
        is_arithmetic = all(isinstance(part, _ARITHMETIC) for part in sympy.preorder_traversal(expr))
        if is_arithmetic and not expr.is_Integer and expr.free_symbols <= inputs.keys():
            if expr not in made:
                with gm.graph.inserting_before(first):
                    made[expr] = sympy_interp(PythonReferenceAnalysis, inputs, expr).node
            node.replace_all_uses_with(made[expr])
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)


def _write_out_casts(gm: fx.GraphModule) -> None:
    """Writes out the casts that an autocast around the call makes: tracing happens before it, so the graph has none.

    What autocast does with an op is seen from the op's result with autocast and without.
    """
    devices = {val.device.type for node in gm.graph.nodes if isinstance(val := node.meta.get("val"), torch.Tensor)}
    dtypes = {device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    for node in list(gm.graph.nodes) if dtypes else ():
        tensors = [arg for arg in node.all_input_nodes if _is_float(arg)]
        if node.op != "call_function" or not tensors or not _is_float(node):
            continue
        low = dtypes.get(node.meta["val"].device.type)
        if low is None or _dtype_with_inputs_as(node, None) == node.meta["val"].dtype:
            continue
        for dtype in (low, torch.float32):
            if _dtype_with_inputs_as(node, dtype) == node.meta["val"].dtype:
                _cast_inputs(node, tensors, dtype)
                break


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point()


def _dtype_with_inputs_as(node: fx.Node, dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype of a node's result without autocast, its inputs cast to `dtype` first; None if it refuses."""

    def value(arg: fx.Node) -> Any:
        return arg.meta["val"].to(dtype) if dtype is not None and _needs_cast(arg, dtype) else arg.meta["val"]

    with node.meta["val"].fake_mode, torch._C._DisableAutocast():
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            return node.target(*args, **kwargs).dtype  # type: ignore[operator]
        except RuntimeError:
            return None


def _needs_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    return _is_float(node) and node.meta["val"].dtype not in (dtype, torch.float64)


def _cast_inputs(node: fx.Node, tensors: Sequence[fx.Node], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if _needs_cast(tensor, dtype):
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(torch.ops.aten._to_copy.default, (tensor,), {"dtype": dtype})
            cast.meta = {**node.meta, "val": tensor.meta["val"].to(dtype)}
            node.replace_input_with(tensor, cast)
