"""Turns each region into `cond(compute | reuse)`, with its slot in and out and its statistics out.

    before:  y = body_0(x, w)
    after:   y, Δ, sums = body_0_guarded(x, w, slot, weights[i], decisions[i])      one for every block
             graph outputs: …, sums, …, Δ, …

At the level `network` the blocks become cond(compute | unwritten) and one guard at the end of the last block holds
x₀ + Δ for all of them. Error: none where a region is computed; that of the extrapolation where it is reused
(`qc_compiler.guard` has the algebra).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import stable_topological_sort

from qc_compiler.costs import flops_of
from qc_compiler.formats import Format
from qc_compiler.graph import (
    GraphPass,
    Interface,
    RegionSpec,
    Report,
    Skip,
    SlotSpec,
    add_placeholder,
    body_calls,
    body_of,
    eliminate_dead_code,
    external_inputs,
    getitems,
    inline,
    invoke_subgraph,
    is_tensor,
    leaving,
    outline,
    outputs,
    placeholders,
    separate_operands,
    separate_results,
    set_body,
    symbols_of,
    trace,
    update_values,
    values_of,
)
from qc_compiler.guard import Guard, cond_body, unwritten
from qc_compiler.regions import SubLayer, find_sublayers, sublayer_names


@dataclass(frozen=True)
class GuardRegions(GraphPass):
    """Guards the regions of one level, and the model's output if asked.

    Attributes:
        level: `network` (one slot), `block` or `sublayer`; None for no guard inside the graph.
        output: Also give the model's output a slot, so that the runtime may skip the whole graph.
        depth: How many residuals a slot remembers: the extrapolation's order + 1.
        storage: The format that slots are stored in; None for the model's dtype.
        num_frames: Frames of the video, for the motion statistic; 1 for images.
    """

    level: str | None
    output: bool = False
    depth: int = 1
    storage: Format | None = None
    num_frames: int = 1

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if "interface" in gm.meta or not calls:  # the output of what has no blocks is not ours to cache
            return Report(changed=0)
        wiring = _Wiring(gm, self.depth)
        skips: list[Skip] = []
        if self.output:
            skips += self._guard_output(wiring)
        if probe := gm.meta.get("probe"):
            self._observe("probe", [probe], wiring)
        if self.level == "network":
            self._guard_network(calls, wiring)
        elif self.level in ("block", "sublayer"):
            skips += self._guard_blocks(calls, wiring)
        wiring.finish()
        return Report(changed=len(wiring.interface.regions), skipped=tuple(skips))

    def _guard(self, bases: tuple[int | None, ...]) -> Guard:
        return Guard(bases, self.depth, self.storage, self.num_frames)

    def _guard_output(self, wiring: "_Wiring") -> list[Skip]:
        results = outputs(wiring.graph)[: wiring.interface.num_outputs]
        if not all(isinstance(r, fx.Node) and is_tensor(r) and r.meta["val"].is_floating_point() for r in results):
            return [Skip("output", "the model returns something else than floating point tensors")]
        self._observe("output", results, wiring)
        return []

    def _observe(self, name: str, results: Sequence[fx.Node], wiring: "_Wiring") -> None:
        """Gives values that are always computed in the graph a slot and a row of statistics."""
        guard = Guard((None,) * len(results), self.depth)
        values, count = values_of(results), len(results)
        region = wiring.add_region(name, -1, 0.0, prunable=False)
        slots = wiring.add_slots(region, [(wiring.empty(*v.shape, dtype=v.dtype, device=v.device),) for v in values])
        part = trace(lambda *args: tuple(guard.observe((), args[:count], args[count:])), *values, *values_of(slots))
        before = wiring.graph.output_node()
        wiring.collect(inline(wiring.graph, wiring.gm, part, [*results, *slots], before), region)

    def _guard_network(self, calls: Sequence[fx.Node], wiring: "_Wiring") -> None:
        gm, graph = wiring.gm, wiring.graph
        inside, own = _between(calls), outputs(graph)[wiring.interface.num_outputs :]
        leave = [n for n in inside if is_tensor(n) and any(user not in inside for user in n.users)]
        results = [n for n in leave if n not in own]
        entering = [call.args[2 + b] for call in calls for b in body_of(gm, call).meta["bases"] if b is not None]
        entering = [node for node in dict.fromkeys(entering) if node not in inside]
        bases = [next((e for e in entering if _same_layout(e, result)), None) for result in results]
        operands = list(dict.fromkeys([*results, *(base for base in bases if base is not None)]))
        operands += symbols_of(graph, operands)
        at = [operands.index(result) for result in results]

        flops = sum(body_of(gm, call).meta["flops"] for call in calls)
        region = wiring.add_region("network", 0, flops, None not in bases)
        guard = self._guard(tuple(None if base is None else operands.index(base) for base in bases))
        end, encoded = guard.build(
            lambda *xs: tuple(xs[i].clone(memory_format=torch.contiguous_format) for i in at), values_of(operands)
        )
        slots = wiring.add_slots(region, encoded)
        steering = wiring.steering(region)
        for call in calls:
            name = f"{call.args[1]}_guarded"
            if not hasattr(gm, name):
                body = body_of(gm, call)
                values = values_of(placeholders(body.graph))
                hollow = unwritten(values_of(outputs(body.graph)))
                gm.add_submodule(name, cond_body(_interpreted(body), hollow, values))
            set_body(gm, call, name, [*call.args[2:], steering[1]])  # type: ignore[list-item]

        outside = {result: [user for user in result.users if user not in inside] for result in results}
        gm.add_submodule("network_end", end)
        with graph.inserting_before(inside[-1].next):
            attr = graph.get_attr("network_end")
            attr.meta["val"] = None
            call = graph.call_function(invoke_subgraph, (attr, "network_end", *operands, *slots, *steering))
        items = getitems(call, values_of(outputs(end.graph)))
        for result, item in zip(results, items):
            for user in outside[result]:
                user.replace_input_with(result, item)
        update_values(graph, items)
        wiring.collect(items[len(results) :], region)

    def _guard_blocks(self, calls: Sequence[fx.Node], wiring: "_Wiring") -> list[Skip]:
        gm = wiring.gm
        sites: dict[str, list[_Site]] = {}
        skips: list[Skip] = []
        for call in calls:
            name = str(call.args[1])
            if name not in sites:
                body, sites[name], why = self._guarded_body(body_of(gm, call), str(call.meta["block"]))
                gm.add_submodule(f"{name}_guarded", body)
                skips += why
            operands = list(call.args[2:])
            regions = []
            for site in sites[name]:
                where, group = f"{call.meta['block']}{site.suffix}", list(sites).index(name)
                region = wiring.add_region(where, group, site.flops, site.prunable)
                operands += [*wiring.add_slots(region, site.encoded), *wiring.steering(region)]
                regions.append(region)
            num_results = len(call.meta["val"])
            set_body(gm, call, f"{name}_guarded", operands)  # type: ignore[arg-type]
            produced = getitems(call, values_of(outputs(body_of(gm, call).graph)))[num_results:]
            for region, site in zip(regions, sites[name]):
                width = sum(map(len, site.encoded)) + 1
                wiring.collect(produced[:width], region)
                produced = produced[width:]
        return skips

    def _guarded_body(self, body: fx.GraphModule, name: str) -> tuple[fx.GraphModule, list["_Site"], list[Skip]]:
        skips: list[Skip] = []
        if self.level == "sublayer" and len(outputs(body.graph)) > len(body.meta["bases"]):
            skips.append(Skip(name, "it keeps attention heads; the whole block is guarded instead"))
        elif self.level == "sublayer":
            sublayers, found = find_sublayers(body, body.meta["bases"])
            skips = [Skip(f"{name}/{skip.where}", skip.reason) for skip in found]
            if sublayers:
                return *self._guarded_sublayers(body, sublayers), skips
            skips.append(Skip(name, "no sub-layers found; the whole block is guarded instead"))
        guard = self._guard(body.meta["bases"])
        guarded, encoded = guard.build(_interpreted(body), values_of(placeholders(body.graph)))
        return guarded, [_Site("", body.meta["flops"], encoded, None not in body.meta["bases"])], skips

    def _guarded_sublayers(
        self, body: fx.GraphModule, sublayers: Sequence[SubLayer]
    ) -> tuple[fx.GraphModule, list["_Site"]]:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(body.graph, copies))
        owner = fx.GraphModule({}, graph)
        sites, produced = [], []
        names = sublayer_names(sublayers, body.meta.get("pruned", ()))
        for i, (sub, name) in enumerate(zip(sublayers, names)):
            nodes, results = [copies[node] for node in sub.nodes], [copies[node] for node in sub.outputs]
            nodes = separate_operands(separate_results(nodes, results), ())
            results = leaving(nodes)
            inputs = external_inputs(nodes)
            inputs += symbols_of(graph, inputs)
            part = outline(nodes, inputs, results)
            guarded, encoded = self._guard((None,) * len(results)).build(_interpreted(part), values_of(inputs))
            steering = _add_placeholders(graph, placeholders(guarded.graph)[len(inputs) :], f"_{i}")
            items = inline(graph, owner, guarded, [*inputs, *steering], nodes[-1].next, f"sublayer_{i}_")
            inside = frozenset(nodes)
            for result, item in zip(results, items):
                for user in [user for user in result.users if user not in inside]:
                    user.replace_input_with(result, item)
            for node in reversed(nodes):
                graph.erase_node(node)
            stable_topological_sort(graph)  # the parts of joint attention leave at different places
            produced += items[len(results) :]
            sites.append(_Site(f"/{name}", flops_of(part), encoded, prunable=True))
        graph.output_node().args = ((*outputs(graph), *produced),)
        owner.recompile()
        return owner, sites


@dataclass(frozen=True)
class _Site:
    """A guarded place in a body: the end of its regions' names, its cost, what stores one residual; see RegionSpec."""

    suffix: str
    flops: float
    encoded: list[tuple[Tensor, ...]]
    prunable: bool


class _Wiring:
    """Adds the inputs and outputs of guards to the main graph; `finish` writes the interface."""

    def __init__(self, gm: fx.GraphModule, depth: int) -> None:
        self.gm, self.graph = gm, gm.graph
        self.interface = Interface(
            depth=depth,
            num_outputs=len(outputs(gm.graph)) - sum(site.num_kept > 0 for site in gm.meta.get("layers", [])),
            sites=gm.meta.get("sites", []),
            num_choices=gm.meta.get("num_choices", 1),
            layers=gm.meta.get("layers", []),
        )
        self._rows: list[fx.Node] = []
        self._values: list[fx.Node] = []
        formals = placeholders(self.graph)
        self._mode = next(node.meta["val"] for node in formals if is_tensor(node)).fake_mode
        self._device = next(
            n.meta["val"] for n in outputs(self.graph) if isinstance(n, fx.Node) and is_tensor(n)
        ).device
        self._decisions, self._weights = (
            add_placeholder(self.graph, "decisions"),
            add_placeholder(self.graph, "weights"),
        )

    def empty(self, *size: int, dtype: torch.dtype, device: Any) -> Tensor:
        with self._mode:
            return torch.empty(size, dtype=dtype, device=device)

    def add_region(self, name: str, group: int, flops: float, prunable: bool) -> int:
        self.interface.regions.append(RegionSpec(name, group, flops, prunable))
        return len(self.interface.regions) - 1

    def add_slots(self, region: int, encoded: Sequence[tuple[Tensor, ...]]) -> list[fx.Node]:
        """Adds a region's slots as inputs, in the order of `Guard.slot_values`."""
        for values in encoded:
            shapes, dtypes = tuple(tuple(v.shape) for v in values), tuple(v.dtype for v in values)
            self.interface.slots.append(SlotSpec(region, shapes, dtypes, values[0].device))
        return [
            add_placeholder(self.graph, f"slot_{region}_{k}_{age}" + ("", "_scale")[part], value)
            for age in range(self.interface.depth)
            for k, values in enumerate(encoded)
            for part, value in enumerate(values)
        ]

    def steering(self, region: int) -> list[fx.Node]:
        """Returns the region's row of weights and its predicate."""
        select = torch.ops.aten.select.int
        with self.graph.inserting_before(placeholders(self.graph)[-1].next):
            weights = self.graph.call_function(select, (self._weights, 0, region))
            predicate = self.graph.call_function(select, (self._decisions, 0, region))
        weights.meta["val"] = self.empty(self.interface.depth, dtype=torch.float32, device=self._device)
        predicate.meta["val"] = self.empty(dtype=torch.bool, device="cpu")
        return [weights, predicate]

    def collect(self, produced: Sequence[fx.Node], region: int) -> None:
        """Makes a region's new slot values and, last, its row of statistics outputs of the graph."""
        assert len(self._rows) == region
        *values, row = produced
        self._values += values
        self._rows.append(row)

    def finish(self) -> None:
        """Completes the graph's inputs and outputs, or takes them back if there is nothing to guard."""
        count, depth = len(self.interface.regions), self.interface.depth
        if not count:
            self.graph.erase_node(self._weights)
            self.graph.erase_node(self._decisions)
            return
        self._decisions.meta["val"] = self.empty(count, dtype=torch.bool, device="cpu")
        self._weights.meta["val"] = self.empty(count, depth, dtype=torch.float32, device=self._device)
        self.graph.output_node().args = ((*outputs(self.graph), *self._rows, *self._values),)
        eliminate_dead_code(self.graph)
        self.gm.meta["interface"] = self.interface


def _interpreted(body: fx.GraphModule) -> Any:
    return lambda *args: tuple(fx.Interpreter(body).run(*args))


def _add_placeholders(graph: fx.Graph, formals: Sequence[fx.Node], suffix: str) -> list[fx.Node]:
    return [add_placeholder(graph, f"{formal.name}{suffix}", formal.meta["val"]) for formal in formals]


def _between(calls: Sequence[fx.Node]) -> list[fx.Node]:
    """Returns all that depends on the first call and comes no later than the results of the last, in order."""
    nodes = list(calls[0].graph.nodes)
    end = max(nodes.index(node) for node in calls[-1].users if node.target is operator.getitem)
    reached: dict[fx.Node, None] = dict.fromkeys(calls)
    for node in nodes[nodes.index(calls[0]) : end + 1]:
        if any(arg in reached for arg in node.all_input_nodes):
            reached[node] = None
    return sorted(reached, key=nodes.index)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
