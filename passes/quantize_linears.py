"""Puts quantize/dequantize pairs around the linears of the blocks: the graph after it is the semantics.

    before:  y = linear(x, w, b)                                                       in a body that blocks share
    after:   y = linear(dequantize(quantize(x)), dequantize(codes, scales), b)         in the body
             codes, scales = quantize(w)                                               in the main graph, for each block
    with balancing x/s and w·s, with a rotation x·H and w·H take the place of x and w; with a low-rank branch
             y = linear(x̂, quantized residual, b) + up·(down·x)
    with several schemes:
             y = choose(linear of the first, linear of the second, flag)      flag: an element of the input `precision`

Linears that read the same x share its quantizer, which stands right behind what produces x. Error: that of the two
formats (`qc_compiler.formats`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from qc_compiler import ops
from qc_compiler.costs import hint
from qc_compiler.errors import PlanError
from qc_compiler.formats.schemes import PLAIN, WEIGHTS, Scheme
from qc_compiler.formats.transforms import hadamard, rotate, rotation_size, shared_scales
from qc_compiler.graph import (
    GraphPass,
    Report,
    SiteSpec,
    Skip,
    add_call,
    add_operands,
    add_placeholder,
    args_of,
    body_calls,
    body_of,
    drop_unused_parameters,
    fake_mode_of,
    getitems,
    inline,
    placeholders,
    trace,
    values_of,
)
from qc_compiler.kernels import LinearShape, find_kernel
from qc_compiler.kernels.timing import why_slower
from qc_compiler.linears import LinearSite, PackedSite, find_linears, find_packed, name_in, site_name, skips_outside

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeLinears(GraphPass):
    """
    Attributes:
        schemes: Formats of weights and activations; of several, lowest precision first, one is chosen at every step.
            Where `AllocateBits` ran the format of each weight is that of its bits instead.
        emulate: Quantize also where this device has no kernel, or a slower one: the reference semantics in plain
            torch, for measuring quality.
        amax: By module path float32 (K,), the largest magnitudes of a linear's input, for balancing.
    """

    schemes: tuple[Scheme, ...]
    emulate: bool = False
    amax: Mapping[str, Tensor] = field(default_factory=dict)

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if not calls:
            return Report(changed=0)
        already = gm.meta.get("quantized", False)
        skips = [] if already else skips_outside(gm, calls)
        rows, balancer = _PrecisionRows(gm, len(self.schemes)), _Balancer(gm, self.amax)
        changed = 0
        for name in dict.fromkeys(str(call.args[1]) for call in calls):
            users = [call for call in calls if call.args[1] == name]
            sites, found = find_linears(body_of(gm, users[0]))
            skips += [replace(skip, where=name_in(str(users[0].meta["block"]), skip.where)) for skip in found]
            for site in sites:
                schemes = self._schemes_of(site, body_of(gm, users[0]))
                if reason := self._why_not(site, schemes):
                    skips.append(Skip(site_name(users[0], site), reason))
                else:
                    changed += len(users)
                    self._rewrite(gm, name, site, schemes, rows, balancer)
            for packed in find_packed(body_of(gm, users[0])) if len(self.schemes) > 1 and not already else ():
                if packed.form == self.schemes[0].weight or "bits" in body_of(gm, users[0]).meta:
                    changed += len(users)
                    self._choose(gm, name, packed, rows)
        rows.finish()
        drop_unused_parameters(gm)
        gm.meta["quantized"] = True
        return Report(changed, tuple(skips))

    def _choose(self, gm: fx.GraphModule, body: str, packed: PackedSite, rows: "_PrecisionRows") -> None:
        """Lets a rule choose the activations' format of a linear that is packed in the format of its weights."""
        node, graph = packed.node, packed.node.graph
        flags = rows.flags(body, packed)
        x_hats = [_quantized(packed.x, scheme.activation) for scheme in self.schemes]
        with graph.inserting_before(node):
            results = [add_call(graph, aten.linear.default, (x_hat, *args_of(node)[1:])) for x_hat in x_hats]
            for result in results:
                result.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            best = results.pop()
            for flag in reversed(flags):
                best = add_call(graph, ops.choose, (results.pop(), best, flag))
        node.replace_all_uses_with(best)
        graph.erase_node(node)

    def _schemes_of(self, site: LinearSite, body: fx.GraphModule) -> tuple[Scheme, ...]:
        """Returns the schemes with the weight's own width; none where it keeps the model's precision."""
        if "bits" not in body.meta:
            return self.schemes
        weight = WEIGHTS.get(body.meta["bits"][site.name])
        return tuple(replace(scheme, weight=weight) for scheme in self.schemes) if weight else ()

    def _why_not(self, site: LinearSite, schemes: Sequence[Scheme]) -> str | None:
        if not schemes:
            return "its allocation is 16 bits: quantizing it would cost more than its share of the error"
        device, shape = site.weight.meta["val"].device, _shape(site)
        for scheme in () if self.emulate else schemes:
            if scheme.activation == PLAIN:
                continue
            kernel = find_kernel(scheme, device, shape)
            if kernel is None:
                return (
                    f"no kernel multiplies {scheme.activation} with {scheme.weight} on {device.type}: "
                    "option emulate=True computes it in plain torch"
                )
            if slower := why_slower(kernel, scheme, shape, device):
                return slower
        return None

    def _rewrite(
        self,
        gm: fx.GraphModule,
        body: str,
        site: LinearSite,
        schemes: Sequence[Scheme],
        rows: "_PrecisionRows",
        balancer: "_Balancer",
    ) -> None:
        graph, dtype = site.node.graph, site.x.meta["val"].dtype
        flags = rows.flags(body, site)
        held: dict[str, tuple[fx.Node, list[fx.Node], list[fx.Node]]] = {}
        results = []
        for scheme in self._narrowed(site, schemes):
            if scheme.weight not in held:
                held[scheme.weight] = _operands(gm, body, site, scheme, balancer)
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
        for flag in reversed(flags):
            with graph.inserting_before(site.node):
                best = add_call(graph, ops.choose, (results.pop(), best, flag))
        site.node.replace_all_uses_with(best)
        graph.erase_node(site.node)

    def _narrowed(self, site: LinearSite, schemes: Sequence[Scheme]) -> list[Scheme]:
        """Returns the schemes as this device can hold them; one with plain activations shares the others' weight."""
        if self.emulate:
            return list(schemes)
        kernels = [find_kernel(scheme, site.weight.meta["val"].device, _shape(site)) for scheme in schemes]
        narrowed = [kernel.narrowed(scheme) if kernel else scheme for kernel, scheme in zip(kernels, schemes)]
        stored = {scheme.weight: small.weight for scheme, small, kernel in zip(schemes, narrowed, kernels) if kernel}
        return [replace(scheme, weight=stored.get(scheme.weight, scheme.weight)) for scheme in narrowed]


class _PrecisionRows:
    """Adds the input `precision` to the main graph, and of each of its rows the flags to a body."""

    def __init__(self, gm: fx.GraphModule, num_choices: int) -> None:
        self._gm, self._num_choices = gm, num_choices
        self._sites: list[SiteSpec] = []
        self._known: dict[fx.Node, list[fx.Node]] = {}
        self._mode = fake_mode_of(values_of(placeholders(gm.graph)))
        self._precision: fx.Node | None = None
        if num_choices > 1:
            self._precision = add_placeholder(gm.graph, "precision")

    def flags(self, body: str, site: LinearSite | PackedSite) -> list[fx.Node]:
        """Returns the flags, one less than there are choices, that all linears of one x share."""
        if self._precision is None:
            return []
        if site.x not in self._known:
            self._known[site.x] = add_operands(self._gm, body, lambda call: self._row(call, site), prepared=False)
        return self._known[site.x]

    def _row(self, call: fx.Node, site: LinearSite | PackedSite) -> list[fx.Node]:
        select, graph = aten.select.int, self._gm.graph
        with graph.inserting_before(call), self._mode:
            row = graph.call_function(select, (self._precision, 0, len(self._sites)))
            row.meta["val"] = torch.empty(self._num_choices - 1, dtype=torch.bool)
            flags = [graph.call_function(select, (row, 0, j)) for j in range(self._num_choices - 1)]
            for flag in flags:
                flag.meta["val"] = torch.empty((), dtype=torch.bool)
        self._sites.append(SiteSpec(site_name(call, site), str(call.meta["block"])))
        return flags

    def finish(self) -> None:
        """Completes the input, or takes it back where nothing has a choice."""
        if self._precision is not None and not self._sites:
            self._gm.graph.erase_node(self._precision)
        elif self._precision is not None:
            with self._mode:
                self._precision.meta["val"] = torch.empty(len(self._sites), self._num_choices - 1, dtype=torch.bool)
            self._gm.meta["sites"], self._gm.meta["num_choices"] = self._sites, self._num_choices


class _Balancer:
    """Divides activations by SmoothQuant's scales: one division, fused with what makes x, for all linears of one x."""

    def __init__(self, gm: fx.GraphModule, amax: Mapping[str, Tensor]) -> None:
        self._gm, self._amax = gm, amax
        self._known: dict[fx.Node, tuple[fx.Node, dict[fx.Node, fx.Node]]] = {}

    def balanced(self, body: str, site: LinearSite) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
        """Returns x / s in the body, and s in the main graph for each of its calls."""
        if site.x not in self._known:
            formals = placeholders(site.x.graph)
            sites, _ = find_linears(_owner(site.x))
            at = [formals.index(other.weight) for other in sites if other.x is site.x]
            scales: dict[fx.Node, fx.Node] = {}

            def inverse(call: fx.Node) -> list[fx.Node]:
                amax = self._constant(call, site)
                weights = [args_of(call)[2 + i] for i in at]
                part = trace(_scales, *values_of([amax, *weights]))
                scales[call], reciprocal = inline(call.graph, self._gm, part, [amax, *weights], before=call)
                return [reciprocal]

            (operand,) = add_operands(self._gm, body, inverse)
            with site.x.graph.inserting_before(_behind(site.x, operand)):
                self._known[site.x] = add_call(site.x.graph, aten.mul.Tensor, (site.x, operand)), scales
        return self._known[site.x]

    def _constant(self, call: fx.Node, site: LinearSite) -> fx.Node:
        name, weight = site_name(call, site), site.weight.meta["val"]
        if len(self._amax.get(name, ())) != weight.shape[1]:
            raise PlanError(f"the plan has no range for each input channel of {name}: calibrate this model")
        target = "amax_" + name.replace(".", "_")
        self._gm.register_buffer(target, self._amax[name].to(weight.device), persistent=False)
        with call.graph.inserting_before(call), weight.fake_mode:
            node = call.graph.get_attr(target)
            node.meta["val"] = torch.empty(weight.shape[1], dtype=torch.float32, device=weight.device)
        return node


def _scales(amax: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    scales = shared_scales(amax, weights).to(weights[0].dtype)
    return scales, 1 / scales


def _shape(site: LinearSite) -> LinearShape:
    x, w = site.x.meta["val"], site.weight.meta["val"]
    return LinearShape(hint(x.numel()) // w.shape[1], w.shape[1], w.shape[0], w.dtype)


def _operands(
    gm: fx.GraphModule, body: str, site: LinearSite, scheme: Scheme, balancer: _Balancer
) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """Returns, inside the body: x, balanced and rotated if asked; parts and low-rank factors of the weight."""
    x, scales = balancer.balanced(body, site) if scheme.balance else (site.x, {})
    at = 2 + placeholders(x.graph).index(site.weight)
    size = rotation_size(site.weight.meta["val"].shape[1]) if scheme.rotation else 1
    if size > 1:
        x = _rotated(x, *add_operands(gm, body, lambda call: [_hadamard(args_of(call)[at], size)]))

    def of_weight(call: fx.Node) -> list[fx.Node]:
        weight = args_of(call)[at]
        if scales:
            with gm.graph.inserting_before(_behind(weight, scales[call])):
                weight = add_call(gm.graph, aten.mul.Tensor, (weight, scales[call]))
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


def _quantized(x: fx.Node, form: str) -> fx.Node:
    """Returns x̂, of the quantizer right behind x that all its linears share; x itself where it stays plain."""
    if form == PLAIN:
        return x
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
