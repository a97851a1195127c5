"""Turns `dequantize → linear` into this device's kernel, and the other quantizers into plain torch for Inductor.

    before:  y = linear(dequantize(codes_x, …), dequantize(codes_w, …), b)
    after:   y = kernel(codes_x, …, prepared_w, …, b)      its epilogue written out, for Inductor to fuse
             codes_x, … = kernel(x)                        for quantize(x·H), where this device does both at once
             prepared_w = prepare(dequantize(codes_w, …))   in the main graph

Error: that of the kernel (its module states it). Where there is none, the result is the reference's own: a weight that
the main graph quantizes is dequantized there, too, once for all steps; one that is kept packed is decoded at each use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qc_compiler import ops
from qc_compiler.costs import hint
from qc_compiler.formats import decode, parse_format
from qc_compiler.formats.schemes import Scheme
from qc_compiler.formats.transforms import rotation_size
from qc_compiler.graph import (
    GraphPass,
    Report,
    add_call,
    add_operands,
    args_of,
    body_calls,
    body_of,
    drop_unused_parameters,
    eliminate_dead_code,
    inline,
    is_parameter,
    placeholders,
    trace,
    values_of,
)
from qc_compiler.kernels import LinearKernel, LinearShape, find_kernel, find_rotating_quantizer

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear whose weight comes out of a dequantizer.

    Attributes:
        node: The linear.
        x: Its activations: behind a dequantizer, or plain.
        weight: The dequantizer of its weight.
        bias: Of the linear, or None.
        at: Which operands of the body are the weight's parts.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    at: tuple[int, ...]


@dataclass(frozen=True)
class LowerLinears(GraphPass):
    """
    Attributes:
        emulate: Take no kernel.
    """

    emulate: bool = False

    def run(self, gm: fx.GraphModule) -> Report:
        changed = 0
        for name in dict.fromkeys(str(call.args[1]) for call in body_calls(gm)):
            calls = [call for call in body_calls(gm) if call.args[1] == name]
            body = body_of(gm, calls[0])
            if not self.emulate:
                changed += _fuse_rotations(body)
            prepared: dict[Any, list[fx.Node]] = {}  # a weight that several choices read is held once
            decoded: dict[tuple[int, ...], fx.Node] = {}
            for match in find_quantized_linears(body):
                if kernel := self._kernel(match):
                    key = (match.at, kernel.name)
                    if key not in prepared:
                        prepared[key] = _prepared(gm, name, match, kernel)
                    _lower(body, match, kernel, prepared[key])
                elif not any(is_parameter(call.args[2 + i]) for call in calls for i in match.at):  # type: ignore[arg-type]
                    if match.at not in decoded:
                        decoded[match.at] = _decode_outside(gm, name, match)
                    match.node.replace_input_with(match.weight, decoded[match.at])
            eliminate_dead_code(body.graph)
            changed += _write_out(body)
            eliminate_dead_code(body.graph)
        drop_unused_parameters(gm)
        return Report(changed)

    def _kernel(self, match: QuantizedLinear) -> LinearKernel | None:
        if self.emulate or match.x.target is not ops.dequantize:
            return None
        scheme = Scheme(args_of(match.weight)[1], args_of(match.x)[1])
        x, y = match.x.meta["val"], match.node.meta["val"]
        shape = LinearShape(hint(x.numel()) // x.shape[-1], x.shape[-1], y.shape[-1], match.weight.meta["val"].dtype)
        return find_kernel(scheme, x.device, shape)


def find_quantized_linears(body: fx.GraphModule) -> list[QuantizedLinear]:
    formals = placeholders(body.graph)
    found = []
    for node in body.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, bias = (*args_of(node), None)[:3]
        if weight.target is ops.dequantize:
            found.append(QuantizedLinear(node, x, weight, bias, tuple(map(formals.index, args_of(weight)[0]))))
    return found


def _prepared(gm: fx.GraphModule, name: str, match: QuantizedLinear, kernel: LinearKernel) -> list[fx.Node]:
    """Returns the body's operands that hold the weight as the kernel wants it."""
    parts, form, _, *size = args_of(match.weight)
    prepare = trace(lambda *p: kernel.prepare(p, form, *size), *values_of(parts))
    return add_operands(
        gm, name, lambda call: inline(gm.graph, gm, prepare, [args_of(call)[2 + i] for i in match.at], before=call)
    )


def _lower(body: fx.GraphModule, match: QuantizedLinear, kernel: LinearKernel, weight: list[fx.Node]) -> None:
    codes, dtype = list(args_of(match.x)[0]), match.node.meta["val"].dtype

    def run(*args: Tensor) -> tuple[Tensor]:
        x, w, bias = args[: len(codes)], args[len(codes) : len(codes) + len(weight)], args[len(codes) + len(weight) :]
        return (kernel.linear(x, w, bias[0] if bias else None, dtype),)

    operands = [*codes, *weight, *([match.bias] if match.bias is not None else [])]
    (result,) = inline(body.graph, body, trace(run, *values_of(operands)), operands, before=match.node)
    result.meta["nn_module_stack"] = match.node.meta.get("nn_module_stack")
    match.node.replace_all_uses_with(result)
    body.graph.erase_node(match.node)


def _decode_outside(gm: fx.GraphModule, name: str, match: QuantizedLinear) -> fx.Node:
    """Dequantizes a weight in the main graph, where it is quantized; returns the body's operand for it."""

    def decoded(call: fx.Node) -> list[fx.Node]:
        with gm.graph.inserting_before(call):
            parts = [args_of(call)[2 + i] for i in match.at]
            return [add_call(gm.graph, ops.dequantize, (parts, *args_of(match.weight)[1:]))]

    (outside,) = add_operands(gm, name, decoded)
    return outside


def _fuse_rotations(body: fx.GraphModule) -> int:
    """Replaces a rotation and the one quantizer that reads it by the kernel for both, where this device has one.

    Without a rotation a quantizer stays plain torch, which Inductor fuses with the norm in front of it.
    """
    changed = 0
    for node in body.graph.find_nodes(op="call_function", target=ops.quantize):
        x, name = args_of(node)
        source = x.meta.get("rotated")
        if source is None or len(x.users) > 1:
            continue
        kernel, size = find_rotating_quantizer(name, x.meta["val"].device), rotation_size(x.meta["val"].shape[-1])
        if kernel is not None:
            fused = trace(lambda value: tuple(kernel(value, name, size)), source.meta["val"])  # noqa: B023
            _replace_parts(node, inline(body.graph, body, fused, [source], before=node))
            changed += 1
    return changed


def _replace_parts(node: fx.Node, parts: Sequence[fx.Node]) -> None:
    """Replaces a quantizer by the nodes of its codes and scales."""
    for item in list(node.users):
        item.replace_all_uses_with(parts[args_of(item)[1]])
        item.graph.erase_node(item)
    node.graph.erase_node(node)


def _write_out(body: fx.GraphModule) -> int:
    """Replaces quantizers and dequantizers by the plain torch of their formats."""
    changed = 0
    for node in list(body.graph.nodes):
        if node.target is ops.quantize:
            x, name = args_of(node)
            written = trace(parse_format(name).quantize, x.meta["val"])
            _replace_parts(node, inline(body.graph, body, written, [x], before=node))
        elif node.target is ops.dequantize:
            operands, *how = args_of(node)
            written = trace(lambda *parts: (decode(parts, *how),), *values_of(operands))  # noqa: B023
            (result,) = inline(body.graph, body, written, operands, before=node)
            node.replace_all_uses_with(result)
            body.graph.erase_node(node)
        else:
            continue
        changed += 1
    return changed
