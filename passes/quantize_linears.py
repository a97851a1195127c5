"""Puts quantize/dequantize pairs around the linears of the blocks: the graph after it is the semantics.

    before:  y = linear(x, w, b)                                                       in a body that blocks share
    after:   y = linear(dequantize(quantize(x)), dequantize(codes, scales), b)         in the body
             codes, scales = quantize(w)                                               in the main graph, for each block
    with a rotation x·H and w·H take the place of x and w; with a low-rank branch
             y = linear(x̂, quantized residual, b) + up·(down·x)
    with several schemes:
             y = choose(linear of the first, linear of the second, flag)      flag: an element of the input `precision`

Linears that read the same x share its quantizer, which stands right behind what produces x. Error: that of the two
formats (`qc_compiler.formats`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qc_compiler import ops
from qc_compiler.cost import hint
from qc_compiler.formats.schemes import Scheme
from qc_compiler.formats.transforms import hadamard, rotate, rotation_size
from qc_compiler.graph import (
    GraphPass,
    Report,
    SiteSpec,
    Skip,
    add_call,
    add_operands,
    body_calls,
    body_of,
    drop_unused_parameters,
    fake_mode_of,
    getitems,
    inline,
    is_parameter,
    module_path,
    placeholders,
    trace,
    values_of,
)
from qc_compiler.kernels import LinearShape, find_kernel
from qc_compiler.kernels.timing import why_slower

aten = torch.ops.aten
NARROW = 32  # linears with fewer inputs or outputs (a LoRA's branch) have nothing to gain


@dataclass(frozen=True)
class LinearSite:
    """One linear of a body.

    Attributes:
        node: The linear.
        weight: The body's operand that holds its weight (N, K).
        name: Module path in the first block that calls the body.
    """

    node: fx.Node
    weight: fx.Node
    name: str

    @property
    def x(self) -> fx.Node:
        """Its activations (…, K); read anew, since they may be a linear that has been rewritten meanwhile."""
        return _args(self.node)[0]


@dataclass(frozen=True)
class QuantizeLinears(GraphPass):
    """
    Attributes:
        schemes: Formats of weights and activations; of several, lowest precision first, one is chosen at every step.
        emulate: Quantize also where this device has no kernel, or a slower one: the reference semantics in plain
            torch, for measuring quality.
    """

    schemes: tuple[Scheme, ...]
    emulate: bool = False

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if not calls:
            return Report(changed=0)
        skips = [] if gm.meta.get("quantized") else _skips_outside(gm, calls)
        rows = _PrecisionRows(gm, len(self.schemes))
        changed = 0
        for name in dict.fromkeys(str(call.args[1]) for call in calls):
            users = [call for call in calls if call.args[1] == name]
            sites, found = find_linears(body_of(gm, users[0]))
            skips += found
            for site in sites:
                if reason := self._why_not(site):
                    skips.append(Skip(site.name, reason))
                else:
                    changed += len(users)
                    self._rewrite(gm, name, site, rows)
        rows.finish()
        drop_unused_parameters(gm)
        gm.meta["quantized"] = True
        return Report(changed, tuple(skips))

    def _why_not(self, site: LinearSite) -> str | None:
        device, shape = site.weight.meta["val"].device, _shape(site)
        for scheme in () if self.emulate else self.schemes:
            kernel = find_kernel(scheme, device, shape)
            if kernel is None:
                return (
                    f"no kernel multiplies {scheme.activation} with {scheme.weight} on {device.type}: "
                    "option emulate=True computes it in plain torch"
                )
            if slower := why_slower(kernel, scheme, shape, device):
                return slower
        return None

    def _rewrite(self, gm: fx.GraphModule, body: str, site: LinearSite, rows: "_PrecisionRows") -> None:
        graph, dtype, device = site.node.graph, site.x.meta["val"].dtype, site.weight.meta["val"].device
        at = 2 + placeholders(graph).index(site.weight)
        held: dict[str, tuple[fx.Node, list[fx.Node], list[fx.Node]]] = {}
        results = []
        for wanted in self.schemes:
            kernel = None if self.emulate else find_kernel(wanted, device, _shape(site))
            scheme = kernel.narrowed(wanted) if kernel else wanted
            if scheme.weight not in held:
                held[scheme.weight] = _operands(gm, body, site, at, scheme)
            x, parts, branch = held[scheme.weight]
            x_hat = _quantized(x, scheme.activation)
            with graph.inserting_before(site.node):
                w_hat = add_call(graph, ops.dequantize, (parts, scheme.weight, dtype))
                result = add_call(graph, aten.linear.default, (x_hat, w_hat, *site.node.args[2:]))
                result.meta["nn_module_stack"] = site.node.meta.get("nn_module_stack")
                for factor in branch:
                    x = add_call(graph, aten.linear.default, (x, factor))
                    x.meta["low_rank"] = True
                if branch:
                    result = add_call(graph, aten.add.Tensor, (result, x))
                results.append(result)
        best = results.pop()
        for flag in reversed(rows.flags(body, site)):
            with graph.inserting_before(site.node):
                best = add_call(graph, ops.choose, (results.pop(), best, flag))
        site.node.replace_all_uses_with(best)
        graph.erase_node(site.node)


class _PrecisionRows:
    """Adds the input `precision` to the main graph, and of each of its rows the flags to a body."""

    def __init__(self, gm: fx.GraphModule, num_choices: int) -> None:
        self._gm, self._num_choices = gm, num_choices
        self._sites: list[SiteSpec] = []
        self._known: dict[fx.Node, list[fx.Node]] = {}
        self._mode = fake_mode_of(values_of(placeholders(gm.graph)))
        self._precision: fx.Node | None = None
        if num_choices > 1:
            with gm.graph.inserting_after(placeholders(gm.graph)[-1]):
                self._precision = gm.graph.placeholder("precision")

    def flags(self, body: str, site: LinearSite) -> list[fx.Node]:
        """Returns the flags, one less than there are choices, that all linears of one x share."""
        if self._precision is None:
            return []
        if site.x not in self._known:
            self._known[site.x] = add_operands(self._gm, body, lambda call: self._row(call, site.name), prepared=False)
        return self._known[site.x]

    def _row(self, call: fx.Node, name: str) -> list[fx.Node]:
        select, graph = aten.select.int, self._gm.graph
        block = str(call.meta["block"])
        with graph.inserting_before(call), self._mode:
            row = graph.call_function(select, (self._precision, 0, len(self._sites)))
            row.meta["val"] = torch.empty(self._num_choices - 1, dtype=torch.bool)
            flags = [graph.call_function(select, (row, 0, j)) for j in range(self._num_choices - 1)]
            for flag in flags:
                flag.meta["val"] = torch.empty((), dtype=torch.bool)
        self._sites.append(SiteSpec(f"{block}.{name.removeprefix(_prefix(name, block))}", block))
        return flags

    def finish(self) -> None:
        """Completes the input, or takes it back where nothing has a choice."""
        if self._precision is not None and not self._sites:
            self._gm.graph.erase_node(self._precision)
        elif self._precision is not None:
            with self._mode:
                self._precision.meta["val"] = torch.empty(len(self._sites), self._num_choices - 1, dtype=torch.bool)
            self._gm.meta["sites"], self._gm.meta["num_choices"] = self._sites, self._num_choices


def _prefix(name: str, block: str) -> str:
    """Returns what a name in the first block of a body begins with: as many parts as the block's own name has.

    >>> _prefix("blocks.0.mlp.fc1", "blocks.7")
    'blocks.0.'
    """
    return ".".join(name.split(".")[: block.count(".") + 1]) + "."


def _shape(site: LinearSite) -> LinearShape:
    x, w = site.x.meta["val"], site.weight.meta["val"]
    return LinearShape(hint(x.numel()) // w.shape[1], w.shape[1], w.shape[0], w.dtype)


def _operands(
    gm: fx.GraphModule, body: str, site: LinearSite, at: int, scheme: Scheme
) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """Returns, inside the body: x, rotated if the scheme says so; the parts of the weight; its low-rank factors."""
    x, size = site.x, rotation_size(site.weight.meta["val"].shape[1]) if scheme.rotation else 1
    if size > 1:
        x = _rotated(x, *add_operands(gm, body, lambda call: [_hadamard(_args(call)[at], size)]))

    def of_weight(call: fx.Node) -> list[fx.Node]:
        weight = _args(call)[at]
        if size > 1:
            weight = _rotated(weight, _hadamard(weight, size))
        if not scheme.rank:
            return _parts(weight, scheme.weight)
        with weight.graph.inserting_before(_behind(weight)):
            up, down, residual = getitems(add_call(weight.graph, ops.low_rank, (weight, scheme.rank)))
        return [*_parts(residual, scheme.weight), down, up]

    operands = add_operands(gm, body, of_weight)
    count = len(operands) - 2 * bool(scheme.rank)
    return x, operands[:count], operands[count:]


def _rotated(x: fx.Node, matrix: fx.Node) -> fx.Node:
    """Returns x · H, computed once behind x; `rotated` on a node says of what it is the rotation."""
    for node in x.graph.nodes:
        if node.meta.get("rotated") is x:
            return node
    part = trace(lambda *args: (rotate(*args),), x.meta["val"], matrix.meta["val"])
    (result,) = inline(x.graph, _owner(x), part, [x, matrix], before=_behind(x, matrix))
    result.meta["rotated"] = x
    return result


def _hadamard(weight: fx.Node, size: int) -> fx.Node:
    """Returns the Hadamard matrix in the main graph, one for every size."""
    for node in weight.graph.nodes:
        if node.meta.get("hadamard") == size:
            return node
    part = trace(lambda w: (hadamard(size, w.device),), weight.meta["val"])
    before = placeholders(weight.graph)[-1].next
    (result,) = inline(weight.graph, _owner(weight), part, [weight], before=before)
    result.meta["hadamard"] = size
    return result


def _owner(node: fx.Node) -> fx.GraphModule:
    assert node.graph.owning_module is not None
    return node.graph.owning_module


def _behind(*nodes: fx.Node) -> fx.Node:
    """Returns the first place where all of these nodes are known, and all inputs of the graph."""
    order = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    return max((*nodes, placeholders(nodes[0].graph)[-1]), key=order.__getitem__).next


def find_linears(body: fx.GraphModule) -> tuple[list[LinearSite], list[Skip]]:
    """Finds the linears of a body that can be quantized; those that are quantized already are passed over."""
    sites, skips = [], []
    for node in body.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = _args(node)[1]
        if weight.target is ops.dequantize or node.meta.get("low_rank"):
            continue
        site = LinearSite(node, weight, module_path(node))
        if reason := _unsuited(site):
            skips.append(Skip(site.name, reason))
        else:
            sites.append(site)
    return sites, skips


def _unsuited(site: LinearSite) -> str | None:
    x, weight = site.x.meta["val"], site.weight.meta["val"]
    if not is_parameter(site.weight):
        return "its weight is computed, not a parameter"
    if len(site.weight.users) > 1:
        return "its weight has another use"
    if x.dim() < 3 or x.shape[-2] == 1:
        return "it sees one row a sample (modulation): there is little to gain and much to lose"
    if min(weight.shape) < NARROW:
        return f"it is only {min(weight.shape)} wide"
    return None


def _skips_outside(gm: fx.GraphModule, calls: list[fx.Node]) -> list[Skip]:
    """Names the dense layers outside the blocks, with what they are."""
    dense = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    skips = []
    for node in gm.graph.nodes:
        if node.target not in dense:
            continue
        x = _args(node)[0].meta["val"]
        if node.target is not aten.linear.default:
            what = "patch embedding"
        elif x.dim() < 3 or x.shape[-2] == 1:
            what = "timestep embedding or modulation"
        elif order[node] > order[calls[-1]]:
            what = "final layer"
        else:
            what = "embedding"
        skips.append(Skip(module_path(node), f"{what}, outside the blocks: it stays in the model's precision"))
    return skips


def _quantized(x: fx.Node, form: str) -> fx.Node:
    """Returns x̂, of the quantizer right behind x that all its linears share."""
    for user in x.users:
        if user.target is ops.quantize and user.args[1] == form:
            (hat,) = {hat for part in user.users for hat in part.users if hat.target is ops.dequantize}
            return hat
    graph = x.graph
    with graph.inserting_before(_behind(x)):
        codes = add_call(graph, ops.quantize, (x, form))
        parts = getitems(codes)
        return add_call(graph, ops.dequantize, (parts, form, x.meta["val"].dtype))


def _parts(weight: fx.Node, form: str) -> list[fx.Node]:
    """Returns the parts of a weight, quantized once in the main graph however many blocks use it."""
    for user in weight.users:
        if user.target is ops.quantize and user.args[1] == form:
            return getitems(user)
    with weight.graph.inserting_before(_behind(weight)):
        return getitems(add_call(weight.graph, ops.quantize, (weight, form)))


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args
