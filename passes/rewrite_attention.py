"""Turns attention into head-wise attention: each head full, an arrow or cached, as the host says at every step.

    before:  o = scaled_dot_product_attention(q, k, v)                                 in a body that blocks share
    after:   o = headwise_attention(q, k, v, modes)                                    where no head is ever cached
             o = headwise_attention(q, k, v, modes, kept);  kept' = store_heads(o)     where some are
             o = choose(load_heads(kept), headwise_attention(…), attends)              where all may be
             kept' = choose(kept, store_heads(o), attends)

`modes` and `attends` are rows of inputs of the graph, `kept` a slot: the last outputs of those heads alone that a later
step reuses. Where all heads of a layer are cached nothing that only they need is computed: `BranchChoices` moves their
queries, keys and values, with the quantizers, into the branch that is not taken. Layers with equally many kept heads
share a body; a kind of block gets at most four, so a layer may keep some heads for nothing.

With all heads full the result is the same to the bit, in raster order; in the order of time sums are taken in another
order. Source: DiTFastAttnV2, arXiv 2503.22796.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from qc_compiler import ops
from qc_compiler.clock import find_clock, find_latent
from qc_compiler.graph import (
    AttentionSite,
    GraphPass,
    Report,
    Skip,
    add_call,
    add_operands,
    add_placeholder,
    add_results,
    args_of,
    body_calls,
    body_of,
    fake_mode_of,
    getitems,
    inline,
    module_path,
    outputs,
    placeholders,
    replace,
    scale_of,
    separate_bodies,
    trace,
    values_of,
    why_not_plain,
)
from qc_compiler.linears import name_in
from qc_compiler.options import Options
from qc_compiler.plan import HeadPlan
from qc_compiler.tokens import Layout, TokenLayouts, num_text_of

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
MAX_BODIES = 4  # of one kind of block, for different numbers of kept heads


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    Attributes:
        node: In the block's body.
        name: Module path.
        num_text: T if the text comes first, −T if it comes last.
    """

    node: fx.Node
    name: str
    num_text: int

    @property
    def num_heads(self) -> int:
        return int(self.node.meta["val"].shape[1])


@dataclass(frozen=True)
class RewriteAttention(GraphPass):
    """
    Attributes:
        options: Which input is the timestep, and where the text is, if the graph does not say it.
        plan: Which heads of which layers are ever cached, and the order of the tokens.
        num_frames: Frames of the video, for the order of time.
    """

    options: Options
    plan: HeadPlan
    num_frames: int = 1

    def run(self, gm: fx.GraphModule) -> Report:
        formals = placeholders(gm.graph)
        latent = find_latent(formals, outputs(gm.graph), find_clock(formals, self.options))
        if "layers" in gm.meta or latent is None:
            return Report(changed=0)
        layouts, skips = TokenLayouts(gm, formals[latent]), list[Skip]()
        sites = {call: self._find(gm, call, layouts, skips) for call in body_calls(gm)}
        if not any(sites.values()):
            return Report(changed=0, skipped=tuple(skips))
        kinds = {call: (call.args[1], *((site.node, site.num_text) for site in found)) for call, found in sites.items()}
        counts = _rounded({call: tuple(map(self._num_kept, found)) for call, found in sites.items()}, kinds)
        separate_bodies(gm, {call: (kinds[call], counts[call]) for call in sites})
        wiring = _Wiring(gm, max(site.num_heads for found in sites.values() for site in found))
        for call, found in sites.items():
            for number, (site, count) in enumerate(zip(found, counts[call])):
                wiring.add_row(call, number, site, count)
        for call in {call.args[1]: call for call in reversed(sites)}.values():  # the first of each body
            own = self._find(gm, call, layouts, [])
            for number, (site, count) in enumerate(zip(own, counts[call])):
                operands = add_operands(gm, str(call.args[1]), partial(wiring.operands, number), prepared=False)
                self._rewrite(gm, str(call.args[1]), site, operands, count)
        wiring.finish()
        return Report(sum(map(len, sites.values())), tuple(skips))

    def _num_kept(self, site: Attention) -> int:
        return len(self.plan.kept(site.name, site.num_heads)) if self.plan.layers else site.num_heads

    def _find(self, gm: fx.GraphModule, call: fx.Node, layouts: TokenLayouts, skips: list[Skip]) -> list[Attention]:
        found: dict[str, Attention] = {}
        for node in body_of(gm, call).graph.find_nodes(op="call_function", target=_SDPA):
            name = name_in(str(call.meta["block"]), module_path(node))
            name += f"#{len(found) + 1}" if name in found else ""
            if reason := _why_not(node):
                skips.append(Skip(name, reason))
                continue
            query, key = (layouts.of(call, x, 2) for x in args_of(node)[:2])
            num_text = self.options.text_tokens if self.options.text_tokens is not None else num_text_of(query)
            if reason := self._why_not_tokens(query, key, num_text):
                skips.append(Skip(name, reason))
            elif num_text is not None:
                found[name] = Attention(node, name, num_text)
        return list(found.values())

    def _why_not_tokens(self, query: Layout, key: Layout, num_text: int | None) -> str | None:
        if query != key:
            return "it is cross-attention: its keys are other tokens than its queries"
        tokens = sum(segment.length for segment in query)
        if num_text is None:
            kinds = " + ".join(f"{segment.length} {'vision' if segment.is_vision else 'text'}" for segment in query)
            return f"its tokens are {kinds}: text can only come first or last; the option text_tokens says where it is"
        if abs(num_text) >= tokens:
            return f"text_tokens={num_text} leaves none of its {tokens} tokens to the image"
        if self.plan.order == "time" and (self.num_frames < 2 or (tokens - abs(num_text)) % self.num_frames):
            return f"its {tokens - abs(num_text)} vision tokens are not those of {self.num_frames} frames"
        return None

    def _rewrite(
        self,
        gm: fx.GraphModule,
        body: str,
        site: Attention,
        operands: Sequence[fx.Node],
        count: int,
    ) -> None:
        modes, *steering = operands
        node, graph, owner = site.node, site.node.graph, site.node.graph.owning_module
        assert owner is not None
        qkv = list(args_of(node)[:3])
        if self.plan.order == "time":
            there = trace(lambda *xs: tuple(_by_place(x, site.num_text, self.num_frames) for x in xs), *values_of(qkv))
            qkv = inline(graph, owner, there, qkv, before=node)
        with graph.inserting_before(node):
            kept = steering[1] if count else None
            result = add_call(graph, ops.headwise_attention, (*qkv, modes, kept, site.num_text, scale_of(node)))
            result.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            if count:
                stored = add_call(graph, ops.store_heads, (result, modes, count))
                if count == site.num_heads:
                    result, stored = _choices(result, stored, modes, *steering)
                add_results(gm, body, [stored])
        if self.plan.order == "time":
            back = trace(lambda x: (_by_frame(x, site.num_text, self.num_frames),), result.meta["val"])
            (result,) = inline(graph, owner, back, [result], before=node)
        replace(node, result)


def _choices(
    result: fx.Node, stored: fx.Node, modes: fx.Node, attends: fx.Node, kept: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Returns attention and slot as they are computed or cached; inserts at the graph's current point."""
    graph = result.graph
    loaded, same = add_call(graph, ops.load_heads, (kept, modes)), add_call(graph, aten.clone.default, (kept,))
    # contiguous, as results of a `cond` are: (B, S, H, D)
    ways = [add_call(graph, aten.transpose.int, (x, 1, 2)) for x in (loaded, result)]
    chosen = add_call(graph, ops.choose, (*ways, attends))
    slot = add_call(graph, ops.choose, (same, stored, attends))
    return add_call(graph, aten.transpose.int, (chosen, 1, 2)), slot


def _why_not(node: fx.Node) -> str | None:
    if reason := why_not_plain(node):
        return reason
    q, k, v = values_of(args_of(node)[:3])
    if not isinstance(q.shape[2], int) or not isinstance(k.shape[2], int):
        return "its number of tokens is symbolic: compile with dynamic=False"
    if k.shape != q.shape:
        return "it is cross-attention: its keys are other tokens than its queries"
    if v.shape != q.shape:
        return f"its values are {v.shape[-1]} wide, its queries {q.shape[-1]}"
    return None


def _rounded(
    counts: Mapping[fx.Node, tuple[int, ...]], kinds: Mapping[fx.Node, Hashable]
) -> dict[fx.Node, tuple[int, ...]]:
    """Returns at least as many kept heads for each call, in at most `MAX_BODIES` different ways for each kind."""
    known: dict[Hashable, set[tuple[int, ...]]] = {}
    for call, count in counts.items():
        known.setdefault(kinds[call], set()).add(count)
    most: dict[tuple[Hashable, tuple[int, ...]], tuple[int, ...]] = {}
    for kind, given in known.items():
        ways = sorted(given, key=lambda way: (sum(way), way))
        size = -(-len(ways) // MAX_BODIES)
        for group in (ways[i : i + size] for i in range(0, len(ways), size)):
            most |= {(kind, way): tuple(map(max, zip(*group))) for way in group}
    return {call: most[kinds[call], count] for call, count in counts.items()}


class _Wiring:
    """Adds to the main graph the inputs `modes` and `attends`, a slot for the kept heads of a layer, and its output."""

    def __init__(self, gm: fx.GraphModule, num_heads: int) -> None:
        self._gm, self._num_heads = gm, num_heads
        self._mode = fake_mode_of(values_of(placeholders(gm.graph)))
        self._sites: list[AttentionSite] = []
        self._at: dict[tuple[fx.Node, int], tuple[int, fx.Node | None]] = {}
        self._modes, self._attends = add_placeholder(gm.graph, "modes"), add_placeholder(gm.graph, "attends")

    def add_row(self, call: fx.Node, number: int, site: Attention, num_kept: int) -> None:
        """Adds a layer: the attention `number` of a block."""
        val = site.node.meta["val"]
        batch, heads, tokens, width = val.shape
        shape = (batch, num_kept, tokens, width)
        slot = None
        if num_kept:
            with self._mode:
                slot = add_placeholder(self._gm.graph, f"kept_{len(self._sites)}", val.new_empty(shape))
        self._at[call, number] = len(self._sites), slot
        block = str(call.meta["block"])
        self._sites.append(AttentionSite(site.name, block, heads, site.num_text, shape, val.dtype, val.device))

    def operands(self, number: int, call: fx.Node) -> list[fx.Node]:
        """Returns a layer's row of `modes` and, where it keeps heads, its element of `attends` and its slot."""
        row, slot = self._at[call, number]
        graph, heads = self._gm.graph, self._sites[row].num_heads
        with graph.inserting_before(call), self._mode:
            modes = graph.call_function(aten.select.int, (self._modes, 0, row))
            modes.meta["val"] = torch.empty(2, self._num_heads, dtype=torch.int32)
            if heads < self._num_heads:
                modes = add_call(graph, aten.slice.Tensor, (modes, 1, 0, heads))
            if slot is None:
                return [modes]
            attends = graph.call_function(aten.select.int, (self._attends, 0, row))
            attends.meta["val"] = torch.empty((), dtype=torch.bool)
        return [modes, attends, slot]

    def finish(self) -> None:
        """Completes the inputs, and makes the new slots outputs of the graph, in the order of the layers."""
        count = len(self._sites)
        with self._mode:
            self._modes.meta["val"] = torch.empty(count, 2, self._num_heads, dtype=torch.int32)
            self._attends.meta["val"] = torch.empty(count, dtype=torch.bool)
        slots = []
        for call in body_calls(self._gm):
            own = [slot for (known, _), (_, slot) in self._at.items() if known is call and slot is not None]
            slots += getitems(call)[-len(own) :] if own else []
        end = self._gm.graph.output_node()
        end.args = ((*outputs(self._gm.graph), *slots),)
        self._gm.meta["layers"] = self._sites


def _by_place(x: Tensor, num_text: int, num_frames: int) -> Tensor:
    """Reorders the vision tokens of (B, H, S, D) from one frame after the other to one place after the other."""
    return _swapped(x, num_text, num_frames)


def _by_frame(x: Tensor, num_text: int, num_frames: int) -> Tensor:
    """Undoes `_by_place`."""
    return _swapped(x, num_text, (x.shape[2] - abs(num_text)) // num_frames)


def _swapped(x: Tensor, num_text: int, rows: int) -> Tensor:
    """Transposes the vision tokens of (B, H, S, D), laid out as `rows` × columns."""
    first, last = max(num_text, 0), x.shape[2] + min(num_text, 0)
    vision = x[:, :, first:last].unflatten(2, (rows, -1)).transpose(2, 3).flatten(2, 3)
    return torch.cat([x[:, :, :first], vision, x[:, :, last:]], dim=2)
