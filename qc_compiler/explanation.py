"""What quantcache would do to a model, without compiling it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.tree import Tree
from torch import fx

from .backend import rewrite
from .clock import find_clock, find_latent
from .errors import UnsupportedModelError
from .graph import Skip, body_calls, body_of, copy_of, is_parameter, outputs, placeholders
from .options import parse_options
from .pipeline import PassRun
from .plan import Plan
from .regions import find_sublayers


@dataclass(frozen=True)
class GraphExplanation:
    """One graph of the model (a graph break makes several).

    Attributes:
        runs: What each pass changed, and what it skipped with which reason.
        regions: Lines of the region tree: group, block, sub-layers with their heads.
        timestep, sample: Names of the inputs that steps are told by.
        slot_bytes: One stream's slots when full; None with symbolic sizes.
        plain: Why this graph would run as plain Inductor; None if it is cached.
        parameter_bytes: Of the parameters and buffers that are still read; None with symbolic sizes.
        pruned: Names of the blocks and sub-layers that left.
    """

    runs: tuple[PassRun, ...]
    regions: tuple[tuple[str, ...], ...]
    timestep: str | None
    sample: str | None
    slot_bytes: int | None
    plain: str | None
    parameter_bytes: int | None = None
    pruned: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[Skip, ...]:
        return tuple(skip for run in self.runs for skip in run.report.skipped)


@dataclass(frozen=True)
class Explanation:
    """What happens to each graph of a model; prints as tables.

    Attributes:
        plan: The plan in the options, whose figures and reasons are printed too; or None.
    """

    graphs: tuple[GraphExplanation, ...]
    plan: Plan | None = None

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            for number, graph in enumerate(self.graphs):
                table = Table(title=f"graph {number}", title_justify="left")
                for heading in ("pass", "changed", "ms", "left alone, and why"):
                    table.add_column(heading, justify="right" if heading in ("changed", "ms") else "left")
                for run in graph.runs:
                    reasons = "\n".join(f"{skip.where}: {skip.reason}" for skip in run.report.skipped)
                    table.add_row(run.name, str(run.report.changed), f"{run.elapsed_ms:.0f}", reasons)
                console.print(table)
                tree = Tree("network")
                for block, *parts in graph.regions:
                    branch = tree.add(block)
                    for part in parts:
                        branch.add(part)
                console.print(tree)
                if graph.plain:
                    console.print(f"runs as plain Inductor: {graph.plain}", highlight=False)
                else:
                    slots, parameters = map(_mebibytes, (graph.slot_bytes, graph.parameter_bytes))
                    console.print(
                        f"timestep {graph.timestep} · sample {graph.sample} · slots {slots} a stream · parameters "
                        f"{parameters}",
                        highlight=False,
                    )
                if graph.pruned:
                    console.print(f"pruned: {', '.join(graph.pruned)}", highlight=False)
            if self.plan is not None:
                figures = ", ".join(f"{name} {value:.3g}" for name, value in self.plan.measured.items())
                lines = [f"plan: {figures or 'nothing was measured'}", *self.plan.reasons]
                console.print("\n    ".join(lines), highlight=False, soft_wrap=True)
        return capture.get()


def _mebibytes(count: int | None) -> str:
    return "symbolic" if count is None else f"{count / 2**20:.2f} MiB"


def explain(model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Runs the passes over the graphs that `model(*args, **kwargs)` traces to, and the model itself eagerly.

    Args:
        model: Plain or compiled.
        args, kwargs: Of its forward.
        options: As for the backend.
    """
    module = getattr(model, "_orig_mod", model)
    parsed = parse_options(options)
    graphs: list[GraphExplanation] = []

    def explaining_backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        copy = copy_of(gm)
        copy.meta["tensors"] = {str(node.target): value for node, value in zip(placeholders(gm.graph), example_inputs)}
        graphs.append(_explain_graph(copy, len(example_inputs), parsed))
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=explaining_backend)(*args, **kwargs)
    return Explanation(tuple(graphs), parsed.plan)


def _explain_graph(gm: fx.GraphModule, num_inputs: int, options: Any) -> GraphExplanation:
    if options.exact:
        return GraphExplanation((), (), None, None, 0, "everything is off (preset 'exact' or cache 'off')")
    try:
        tree: list[tuple[str, ...]] = []
        runs = rewrite(gm, options, lambda name, now: _keep_tree(tree, name, now))
    except UnsupportedModelError as error:
        return GraphExplanation((), (), None, None, 0, str(error))
    formals = placeholders(gm.graph)[:num_inputs]
    clock = find_clock(formals, options)
    latent = find_latent(formals, outputs(gm.graph), clock)
    plain = None
    if not body_calls(gm):
        plain = "no transformer blocks were found"
    elif options.caches and clock is None and options.num_steps is None:
        plain = "no timestep input was found"
    names = [None if i is None else str(formals[i].meta.get("source")) for i in (clock, latent)]
    slots = [node for node in placeholders(gm.graph) if node.name.startswith("slot_")]
    prepared = gm.meta["prepare"].meta["sources"] if "prepare" in gm.meta else []
    read = [node for i, node in enumerate(formals) if is_parameter(node) and (node.users or i in prepared)]
    sizes, pruned = (_num_bytes(slots), _num_bytes(read)), gm.meta.get("pruned", ())
    return GraphExplanation(tuple(runs), tuple(tree), names[0], names[1], sizes[0], plain, sizes[1], pruned)


def _num_bytes(nodes: Sequence[fx.Node]) -> int | None:
    sizes = [node.meta["val"].nbytes for node in nodes]
    return sum(sizes) if all(isinstance(size, int) for size in sizes) else None


def _keep_tree(tree: list[tuple[str, ...]], name: str, gm: fx.GraphModule) -> None:
    if name in ("share-bodies", "prune"):
        tree[:] = _tree(gm)


def _tree(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """Returns for each block its name, group and sub-layers."""
    lines = []
    for call in body_calls(gm):
        body = body_of(gm, call)
        sublayers, _ = find_sublayers(body, body.meta["bases"])
        streams = sum(base is not None for base in body.meta["bases"])
        head = f"{call.meta['block']}  group {call.args[1]}, {streams} stream" + ("s" if streams != 1 else "")
        parts = [f"{sub.kind}" + (f", {sub.num_heads} heads" if sub.num_heads else "") for sub in sublayers]
        lines.append((head, *parts))
    return lines
