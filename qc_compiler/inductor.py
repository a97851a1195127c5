"""Hands a rewritten graph to Inductor.

Our graphs are functional already, so AOTAutograd has nothing to do for them; and it would functionalize every call of
a shared body anew, twice, which made compile time grow with depth again (28 blocks: 41 s instead of 18 s, torch 2.13,
2 CPU cores). So the graph is decomposed here, each body once, and goes straight to `compile_fx_inner`.
"""

import contextlib
import threading
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from .graph import add_placeholder, cond, fake_mode_of, invoke_subgraph, is_parameter, outputs, placeholders, values_of


def compile_graph(gm: fx.GraphModule, *, config_patches: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compiles a functional graph whose placeholders carry `meta["val"]`.

    Returns:
        A function of the graph's inputs that returns its flat outputs.
    """
    # Probing the CPU's vector units runs a C++ compiler for 3 s, once a machine; meanwhile there is enough to do here.
    threading.Thread(target=pick_vec_isa, daemon=True).start()
    constants = _lift_constants(gm)
    formals = placeholders(gm.graph)
    mode = _fake_mode(values_of(formals))
    with mode, torch.no_grad(), torch._C._DisableAutocast():
        inputs = [_in_mode(value) for value in values_of(formals)]
        lowered = _decomposed(gm)
    with inductor_config.patch(dict(config_patches or {})), _early_kernels():
        lowered = _recursive_joint_graph_passes(lowered)
        lowered.graph.output_node().meta["user_visible_output_idxs"] = list(range(len(outputs(lowered.graph))))
        static = [i for i, node in enumerate(formals) if is_parameter(node)]
        compiled = compile_fx_inner(lowered, inputs, static_input_idxs=static, is_inference=True)
    return lambda *args: compiled([*args, *constants])


def _lift_constants(gm: fx.GraphModule) -> list[torch.Tensor]:
    """Makes the constants of the main graph its last inputs, and returns them: a body can be given no attribute."""
    constants: list[torch.Tensor] = []
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := getattr(gm, str(node.target)), torch.Tensor):
            node.replace_all_uses_with(add_placeholder(gm.graph, f"constant_{len(constants)}", value))
            gm.graph.erase_node(node)
            constants.append(value)
    return constants


def _decomposed(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a graph in the operators that Inductor lowers; each body and each branch is decomposed once."""
    inputs = [_in_mode(value) for value in values_of(placeholders(gm.graph))]
    return make_fx(_Recorder(gm).run, decomposition_table=select_decomp_table())(*inputs)


class _Recorder(fx.Interpreter):
    """Runs a graph under a tracer; records calls of bodies and branches as they stand, instead of running them too."""

    def run_node(self, n: fx.Node) -> Any:
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        if n.op == "get_attr" and isinstance(body := getattr(self.module, str(n.target)), fx.GraphModule):
            if not hasattr(tracer.root, str(n.target)):
                with disable_proxy_modes_tracing():
                    tracer.root.register_module(n.target, _decomposed(body))
            return getattr(tracer.root, str(n.target))
        if n.target not in (invoke_subgraph, cond):
            return super().run_node(n)
        args = pytree.tree_map(tracer.unwrap_proxy, self.fetch_args_kwargs_from_env(n)[0])
        call = tracer.create_proxy("call_function", n.target, args, {})
        with disable_proxy_modes_tracing():  # or the allocations were recorded, with strides that Inductor cannot lower
            results = tuple(map(_in_mode, n.meta["val"]))
        return track_tensor_tree(results, call, constant=None, tracer=tracer)


@contextlib.contextmanager
def _early_kernels() -> Iterator[None]:
    """Starts the compiler of each kernel when its source is written, while the next one's is being generated.

    Inductor starts them all when it loads the finished module, and waits (28 blocks, 2 CPU cores: 9 s of 30). The
    kernels' cache then finds the same source under way.
    """
    define_kernel, compiler = PythonWrapperCodegen.define_kernel, AsyncCompile()

    def define(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        if kernel_body.startswith("async_compile.cpp_pybinding("):
            eval(kernel_body, {"async_compile": compiler})
        define_kernel(self, kernel_name, kernel_body, *args, **kwargs)

    with unittest.mock.patch.object(PythonWrapperCodegen, "define_kernel", define):
        yield


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    """Returns the mode in which Inductor works: Dynamo keeps one for backends beside its own."""
    context = TracingContext.try_get()
    return context.fake_mode if context and context.fake_mode else fake_mode_of(values)


def _in_mode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value
