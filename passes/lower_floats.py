"""Writes what stays in floats beside int8 linears on the CPU as it is fastest there, no less precise than they are.

    before:  y = gelu(x, tanh);  o = scaled_dot_product_attention(q, k, v)     in a body with a CPU int8 kernel
    after:   y = x·sigmoid(2u);  o = bf16_attention(q, k, v)

Error: the two forms of GELU, ½x·(1 + tanh u) and x·sigmoid(2u), differ by float32 rounding; that of attention is stated
in `qc_compiler.kernels.bf16_attention`: products of bfloat16, a relative error of 0.004 on normal values, where int8
linears have 0.01. Attention stays where a step may choose linears that are not quantized. Bodies without an int8 kernel
are not touched, and so stay bit-identical.

Measured (1 thread, AVX-512, 512 × 512, with the quantizer behind it): GELU by tanh 588 µs, by sigmoid 263 µs. On the
trained image DiT that is an eighth of a step in W8A8. Attention: see the kernel.
"""

import math

import torch
from torch import Tensor, fx

from qc_compiler import ops
from qc_compiler.costs import hint
from qc_compiler.graph import (
    GraphPass,
    Report,
    Skip,
    add_call,
    args_of,
    body_calls,
    body_of,
    inline,
    module_path,
    replace,
    scale_of,
    trace,
    values_of,
    why_not_plain,
)
from qc_compiler.kernels import bf16_attention as kernel
from qc_compiler.linears import name_in

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_INT8 = torch.ops.quantcache.int8_matmul.default


class LowerFloats(GraphPass):
    def run(self, gm: fx.GraphModule) -> Report:
        changed, skips = 0, list[Skip]()
        for call in {str(call.args[1]): call for call in reversed(body_calls(gm))}.values():  # the first of each body
            body = body_of(gm, call)
            if not body.graph.find_nodes(op="call_function", target=_INT8):
                continue
            for node in body.graph.find_nodes(op="call_function", target=aten.gelu.default):
                if "tanh" in node.kwargs.values():
                    part = trace(gelu_by_sigmoid, *values_of(node.args))
                    replace(node, *inline(body.graph, body, part, args_of(node), before=node))
                    changed += 1
            for node in body.graph.find_nodes(op="call_function", target=_SDPA):
                if reason := _why_not(node):
                    skips.append(Skip(name_in(str(call.meta["block"]), module_path(node)), reason))
                    continue
                _lower(node)
                changed += 1
        return Report(changed, tuple(skips))


def _lower(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        result = add_call(node.graph, kernel.bf16_attention, (*args_of(node)[:3], scale_of(node)))
    result.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    replace(node, result)


def _why_not(node: fx.Node) -> str | None:
    q, k, v = values_of(args_of(node)[:3])
    if not kernel.has_bf16_attention(q.device):
        return "its kernel needs a CPU with AVX-512 BF16, and a C++ compiler"
    if any(ops.choose is other.target for other in node.graph.nodes):
        return "some of its steps are not quantized"
    if reason := why_not_plain(node):
        return reason
    if q.dtype != torch.float32:
        return f"it is {str(q.dtype).removeprefix('torch.')}: the kernel takes float32"
    if v.shape[-1] != q.shape[-1]:
        return f"its values are {v.shape[-1]} wide, its queries {q.shape[-1]}"
    if q.shape[-1] > kernel.WIDEST:
        return f"its heads are {q.shape[-1]} wide: the kernel takes up to {kernel.WIDEST}"
    if (keys := hint(k.shape[2])) < kernel.FEW:
        return f"it has {keys} keys: packing fewer than {kernel.FEW} is not worth it"
    return None


def gelu_by_sigmoid(x: Tensor) -> tuple[Tensor]:
    """Returns ½x·(1 + tanh u) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³)."""
    y = x.float()
    return ((y * (2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)).sigmoid()).to(x.dtype),)
