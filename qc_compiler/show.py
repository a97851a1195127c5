"""Our text form of a graph, for goldens, dumps and errors.

graph(%x: f32[2, 16], %w: f32[16, 16]):
  %linear = aten.linear(%x, %w) : f32[2, 16]
  return (%linear)
"""

from typing import Any

import torch
from torch import fx

from .graph import submodules

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}


def show(gm: fx.GraphModule) -> str:
    """Returns the text form of a graph and, below it, of every graph that it calls."""
    parts = [_show_one("graph", gm.graph)]
    parts += [_show_one(f"body {name}", child.graph) for name, child in submodules(gm)]
    return "\n".join(parts)


def _show_one(title: str, graph: fx.Graph) -> str:
    operands, lines = [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            operands.append(f"%{node.name}: {show_type(node.meta.get('val'))}")
        elif node.op == "output":
            lines.append(f"  return {_show_arg(node.args[0])}")
        elif node.op == "get_attr":
            lines.append(f"  %{node.name} = get {node.target}")
        else:
            args = [_show_arg(arg) for arg in node.args]
            args += [f"{key}={_show_arg(value)}" for key, value in node.kwargs.items()]
            val = node.meta.get("val")
            kind = f" : {show_type(val)}" if val is not None else ""
            lines.append(f"  %{node.name} = {_show_target(node.target)}({', '.join(args)}){kind}")
    return "\n".join([f"{title}({', '.join(operands)}):", *lines])


def show_type(val: Any) -> str:
    """
    >>> show_type(torch.empty(2, 3, dtype=torch.bfloat16))
    'bf16[2, 3]'
    """
    if isinstance(val, torch.Tensor):
        return f"{_SHORT.get(val.dtype, str(val.dtype))}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(map(show_type, val))})"
    return str(val)


def _show_target(target: Any) -> str:
    name = str(target)
    if name.endswith((".default", ".Tensor", ".int")):
        name = name.rsplit(".", 1)[0]
    return getattr(target, "__name__", name) if name.startswith("<") else name


def _show_arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (tuple, list)):
        return f"({', '.join(map(_show_arg, arg))})"
    return str(arg)
