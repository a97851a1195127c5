"""Hands a rewritten graph to Inductor.

Our graphs are functional already, so AOTAutograd has nothing to do for them; and it would functionalize every call of
a shared body anew, twice, which made compile time grow with depth again (28 blocks: 41 s instead of 18 s, torch 2.13,
2 CPU cores). So the graph is decomposed here, each body once, and goes straight to `compile_fx_inner`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .graph import fake_mode_of, is_parameter, outputs, placeholders, values_of


def compile_graph(gm: fx.GraphModule, *, config_patches: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compiles a functional graph whose placeholders carry `meta["val"]`.

    Returns:
        A function of the graph's inputs that returns its flat outputs.
    """
    formals = placeholders(gm.graph)
    mode = _fake_mode(values_of(formals))
    with mode, torch.no_grad(), torch._C._DisableAutocast():
        inputs = [_in_mode(value) for value in values_of(formals)]
        lowered = make_fx(lambda *args: fx.Interpreter(gm).run(*args), decomposition_table=select_decomp_table())(
            *inputs
        )
    with inductor_config.patch(dict(config_patches or {})):
        lowered = _recursive_joint_graph_passes(lowered)
        lowered.graph.output_node().meta["user_visible_output_idxs"] = list(range(len(outputs(lowered.graph))))
        static = [i for i, node in enumerate(formals) if is_parameter(node)]
        compiled = compile_fx_inner(lowered, inputs, static_input_idxs=static, is_inference=True)
    return lambda *args: compiled(list(args))


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    """Returns the mode in which Inductor works: Dynamo keeps one for backends beside its own."""
    context = TracingContext.try_get()
    return context.fake_mode if context and context.fake_mode else fake_mode_of(values)


def _in_mode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value
