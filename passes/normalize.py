"""Brings a Dynamo graph to functional pre-dispatch ATen, the one small op set that every later pass knows.

    before:  h = torch.nn.functional.layer_norm(x);  h *= 1 + scale;  torch._C._nn.linear(h, w, b)
    after:   layer_norm(x) → mul → linear: no node mutates anything, linear, attention and norm stay whole

Values do not change: the ops are the ones PyTorch itself would dispatch to. Symbolic sizes survive. `view`s remain as
pure nodes; since nothing is mutated any more, that they alias cannot be observed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.functional_utils import has_data_mutation

from qc_compiler.errors import UnsupportedModelError
from qc_compiler.graph import GraphPass, Report, placeholders, trace
from qc_compiler.show import show


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
        for old, new in zip(operands, placeholders(traced.graph)):
            new.meta["parameter"] = new.meta.get("parameter") or _is_parameter(old)
            new.meta["source"] = names.get(old.target, old.meta.get("source", str(old.target)))
            new._rename(str(old.target))
        gm.graph = traced.graph
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                setattr(gm, node.target, getattr(traced, node.target))
        return Report(changed=0 if show(gm) == before else sum(n.op == "call_function" for n in gm.graph.nodes))


def _is_parameter(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return bool(node.meta.get("parameter")) or static or isinstance(value, torch.nn.Parameter)
