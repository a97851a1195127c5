"""The composition root: Dynamo graph → passes → Inductor → runtime."""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.compiler.config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx

import passes

from . import diffusers_context, registry
from .clock import find_clock, find_frames, find_latent
from .errors import UnsupportedModelError
from .graph import body_calls, copy_of, is_parameter, outputs, placeholders
from .inductor import compile_graph
from .options import Options, parse_options
from .pipeline import PassRun, run_passes, source_key
from .prepared import PreparedGraph, PreparedWeights
from .runtime import GuardedGraph, Runtime
from .show import show

# Dynamo's names of what a linear calls its weight, and of what a `PackedLinear` has instead.
_WEIGHT = re.compile(r"(.*)_(?:parameters|buffers)_(weight|part_\d+|reciprocal|down|up)_?")

if Path(passes.__file__).parent.parent != Path(__file__).parent.parent:
    raise ImportError(
        f"quantcache's package 'passes' is shadowed: expected it beside {Path(__file__).parent}, "
        f"found {passes.__file__}; rename that folder or run from another directory"
    )


def quantcache(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    compile_plain: Callable[..., Any] = compile_fx,
    compile_guarded: Callable[..., Any] = compile_graph,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="quantcache", options={...})`.

    Args:
        gm: What Dynamo captured.
        example_inputs: Its inputs; parameters are the real ones.
        options: See `qc_compiler.options.Options`.
        mode: Inductor's, e.g. `max-autotune-no-cudagraphs`.
        compile_plain, compile_guarded: What turns an untouched and a rewritten graph into a function; tests replace
            them to run graphs as they stand.

    Returns:
        A function of the graph's inputs.

    Raises:
        OptionError: an option has an unknown name or a wrong value.
        PlanError: the plan belongs to another model, or its file is damaged.
        UnsupportedModelError: with `strict`, where the model would run as plain Inductor.
    """
    parsed = parse_options(options)
    inductor = torch._inductor.list_mode_options(mode) if mode else {}
    if parsed.exact:
        return compile_plain(gm, list(example_inputs), config_patches=inductor)
    runtime = registry.runtime_for(example_inputs, options or {}, parsed)
    rewritten = copy_of(gm)
    rewritten.meta["tensors"] = {str(node.target): value for node, value in zip(placeholders(gm.graph), example_inputs)}
    try:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            raise UnsupportedModelError(
                "gradients are enabled, and cached residuals have none: call the model under torch.no_grad()"
            )
        runtime.reports = rewrite(rewritten, parsed, lambda name, now: _keep_shared(runtime, name, now))
        rewritten.meta.pop("tensors")
        if not body_calls(rewritten):
            raise _no_blocks(runtime)
        graph = _guarded_graph(rewritten, len(example_inputs), runtime) if parsed.caches else None
        if parsed.plan is not None and graph is None:
            parsed.plan.check_model(fingerprint(rewritten), ())
    except UnsupportedModelError as error:
        if parsed.strict:
            raise
        runtime.notes.append(str(error))
        _note_reads(runtime, gm, example_inputs)
        warnings.warn(f"quantcache runs this graph as plain Inductor: {error}", stacklevel=2)
        return compile_plain(gm, list(example_inputs), config_patches=inductor)
    _note_reads(runtime, rewritten, example_inputs)
    diffusers_context.install()
    with torch.compiler.config.patch(  # type: ignore[attr-defined]
        cache_key_tag=f"quantcache-{source_key()}"
    ):
        compiled = compile_guarded(rewritten, config_patches=inductor)
    if "prepare" in rewritten.meta:
        weights = _prepared_weights(rewritten, example_inputs, runtime)
        prepare = rewritten.meta["prepare"].meta
        compiled = PreparedGraph(compiled, weights, prepare["sources"], prepare["at"])
    if graph is None:
        return compiled
    graph.compiled = compiled
    return graph


def _prepared_weights(gm: fx.GraphModule, inputs: Sequence[Any], runtime: Runtime) -> PreparedWeights:
    prepare = gm.meta["prepare"]
    key = (show(prepare), tuple(id(inputs[i]) for i in prepare.meta["sources"]))
    return runtime.prepared.setdefault(key, PreparedWeights(prepare))


def _note_reads(runtime: Runtime, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Remembers which parameters a graph reads, and which only regions that left it."""
    unread = gm.meta.get("unread", ())
    for node, x in zip(placeholders(gm.graph), inputs):
        if isinstance(x, torch.nn.Parameter):
            runtime.is_read[x] = runtime.is_read.get(x, False) or node.name not in unread


def _keep_shared(runtime: Runtime, name: str, gm: fx.GraphModule) -> None:
    """Keeps the model's graph as calibration runs it: blocks shared, some pruned, nothing added yet."""
    if name in ("share-bodies", "prune"):
        runtime.shared = copy_of(gm)
        runtime.shared.meta.pop("tensors")  # the runtime outlives neither the model nor weights that it packs
        for node in runtime.shared.graph.find_nodes(op="get_attr"):
            child = getattr(gm, str(node.target))
            setattr(runtime.shared, str(node.target), copy_of(child) if isinstance(child, fx.GraphModule) else child)


def _no_blocks(runtime: Runtime) -> UnsupportedModelError:
    skips = [f"{skip.where}: {skip.reason}" for run in runtime.reports for skip in run.report.skipped]
    why = "; ".join(skips[:3]) or "no module list whose entries hold attention and a residual stream"
    return UnsupportedModelError(f"no transformer blocks were found ({why})")


def _guarded_graph(gm: fx.GraphModule, num_inputs: int, runtime: Runtime) -> GuardedGraph:
    """Returns the callable of a rewritten graph, still to be given its compiled function.

    Raises:
        UnsupportedModelError: there is nothing to guard, or steps cannot be told apart.
        PlanError: the plan belongs to another model.
    """
    options, interface = runtime.options, gm.meta.get("interface")
    if interface is None:
        raise _no_blocks(runtime)
    formals = placeholders(gm.graph)[:num_inputs]
    clock = find_clock(formals, options)
    if clock is None and options.num_steps is None:
        raise UnsupportedModelError(
            "no timestep input was found, so steps cannot be told apart: pass options={'timestep': name of the "
            "input} or options={'num_steps': steps of a trajectory}"
        )
    if options.plan is not None:
        options.plan.check_model(fingerprint(gm), interface.names, interface.fixed)
    runtime.interface, runtime.fingerprint = interface, fingerprint(gm)
    parameters = [i for i, node in enumerate(formals) if is_parameter(node)]
    latent = find_latent(formals, outputs(gm.graph), clock)
    return GuardedGraph(interface, runtime, clock, latent, parameters, _symbols(formals), registry.adopt)


def rewrite(
    gm: fx.GraphModule, options: Options, watch: Callable[[str, fx.GraphModule], None] | None = None
) -> list[PassRun]:
    """Runs the default pipeline over a Dynamo graph, in place; `watch` sees the graph after each pass."""
    num_frames = options.num_frames or find_frames(gm)
    return run_passes(gm, passes.default_pipeline(options, num_frames), options.disable, watch)


def fingerprint(gm: fx.GraphModule) -> str:
    """Returns a hash of a model's structure: its modules that hold parameters, and what is no weight of theirs.

    A packed model has the fingerprint of the original.
    """
    found = set()
    for node in placeholders(gm.graph):
        if is_parameter(node):
            name, value = str(node.meta["source"]), node.meta["val"]
            weight = _WEIGHT.fullmatch(name)
            is_matrix = weight is not None and (value.dim() > 1 or weight[2] != "weight")
            found.add(weight[1] if weight and is_matrix else f"{name} {tuple(value.shape)} {value.dtype}")
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _symbols(formals: Sequence[fx.Node]) -> dict[sympy.Symbol, int]:
    """Returns for each symbolic size the index of the input that carries it."""
    return {
        node.meta["val"].node.expr: i for i, node in enumerate(formals) if isinstance(node.meta["val"], torch.SymInt)
    }
