"""What each region of a model costs, and each variant of it; all as expressions in the symbolic sizes.

computed    its kernels; guarded with depth d also x, y and s₀ read and Δ written, and d·|Δ| of slots
quantized   a linear (rows, inner, outer) becomes three kernels: the quantizer reads x twice and writes codes, the
            product reads codes and packed weights, the epilogue reads its float32 result and writes y; attention
            beside it may have products of bfloat16
attended    the attention's FLOPs times the share of the query–key pairs
reused      y = x + Σⱼ wⱼ·sⱼ: x and the d slots read, y written
pruned      nothing
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy import Expr
from torch import fx

from .clock import plain_name
from .costs import Kernel, expression, find_kernels, tensor_bytes
from .errors import OptionError, nearest
from .formats import parse_format
from .formats.schemes import SCHEMES, Scheme
from .graph import body_calls, body_of, external_inputs, is_parameter, is_tensor, outputs, placeholders, values_of
from .linears import find_linears, name_in
from .regions import find_sublayers

STATES = ("computed", "reused", "pruned")
_ZERO = sympy.S.Zero


@dataclass(frozen=True)
class Cost:
    """Floating point operations, bytes that kernels read and write, bytes of the weights and of the slots."""

    flops: Expr = _ZERO
    bytes_moved: Expr = _ZERO
    weight_bytes: Expr = _ZERO
    slot_bytes: Expr = _ZERO


@dataclass(frozen=True)
class Variant:
    """How a region is run.

    Attributes:
        state: `computed`, `reused` or `pruned`.
        quantize: Name of the scheme of its linears, or of some by module path; None for the model's dtype.
        attended: Part of the query–key pairs that its attention computes.
        depth: How many residuals its slot holds; 0 where nothing guards it.
        cache_dtype: How they are stored, as the option.

    Raises:
        OptionError: the state or the scheme is unknown, or a region without slots is reused.
    """

    state: str = "computed"
    quantize: str | Mapping[str, str] | None = None
    attended: float = 1.0
    depth: int = 0
    cache_dtype: str = "model"

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise OptionError(f"state={self.state!r}: {nearest(self.state, STATES)}")
        for scheme in self._schemes():
            if scheme not in SCHEMES:
                raise OptionError(f"quantize={scheme!r}: {nearest(scheme, SCHEMES)}")
        if self.state == "reused" and self.depth < 1:
            raise OptionError("a region is reused from its slot, which needs a depth of 1 or more")

    def _schemes(self) -> Collection[str]:
        if isinstance(self.quantize, Mapping):
            return set(self.quantize.values())
        return () if self.quantize is None else (self.quantize,)

    def scheme_of(self, kernel: Kernel) -> str | None:
        """Returns the scheme of a kernel; None where it stays as it is."""
        if not kernel.linear:
            return None
        return self.quantize.get(kernel.linear) if isinstance(self.quantize, Mapping) else self.quantize


COMPUTED = Variant()


@dataclass(frozen=True)
class Region:
    """A part of the model.

    Attributes:
        name: As in plans, e.g. `blocks.3` or `blocks.3/mlp`; `outside` is all that belongs to no block.
        kernels: Of one computation.
        weight_bytes: Of the parameters it reads, each once.
        base_bytes: Of the streams that it continues.
        residuals: Of each of its results elements, width (the last axis) and dtype.
        parts: Its sub-layers.
    """

    name: str
    kernels: tuple[Kernel, ...]
    weight_bytes: Expr
    base_bytes: Expr = _ZERO
    residuals: tuple[tuple[Expr, Expr, torch.dtype], ...] = ()
    parts: tuple["Region", ...] = ()

    def cost(self, variant: Variant = COMPUTED) -> Cost:
        """Returns what a variant of this region takes."""
        kernels = [kernel for group in self.run(variant) for kernel in group[-1]]
        pruned = variant.state == "pruned"
        return Cost(
            sum((kernel.flops for kernel in kernels), start=_ZERO),
            sum((kernel.bytes_moved for kernel in kernels), start=_ZERO),
            _ZERO if pruned else self.weight_bytes + self._saved_bytes(variant),
            _ZERO if pruned else variant.depth * self._residual_bytes(variant.cache_dtype),
        )

    def run(self, variant: Variant) -> list[tuple[tuple[Kernel, ...], ...]]:
        """Returns the kernels of a variant: for each part of it the ways to compute it, the variant's own last."""
        y, s = self._residual_bytes("model"), self._residual_bytes(variant.cache_dtype)
        if variant.state == "pruned":
            return []
        if variant.state == "reused":
            return [((_pointwise(self.base_bytes + variant.depth * s + y),),)]
        beside = next(filter(None, map(variant.scheme_of, self.kernels)), "")
        ways = [_ways(kernel, variant, beside) for kernel in self.kernels]
        return [*ways, ((_pointwise(self.base_bytes + y + 2 * s),),)] if variant.depth else ways

    def _residual_bytes(self, cache_dtype: str) -> Expr:
        if cache_dtype == "model":
            return sum((numel * dtype.itemsize for numel, _, dtype in self.residuals), start=_ZERO)
        return sum((stored_bytes(cache_dtype, n / width, width) for n, width, _ in self.residuals), start=_ZERO)

    def _saved_bytes(self, variant: Variant) -> Expr:
        """Returns by how many bytes the weights grow, mostly a negative number."""
        grown = _ZERO
        for kernel in self.kernels:
            if scheme := variant.scheme_of(kernel):
                plain = kernel.shape[1] * kernel.shape[2] * kernel.dtype.itemsize
                grown += packed_bytes(kernel, SCHEMES[scheme]) - plain
        return grown


def packed_bytes(kernel: Kernel, scheme: Scheme) -> Expr:
    """Returns the bytes of a linear's weight in the format of a scheme."""
    _, inner, outer = kernel.shape
    return stored_bytes(scheme.weight, outer, inner, packed=True)


def stored_bytes(form: str, rows: Expr, width: Expr, packed: bool = False) -> Expr:
    """Returns the bytes of rows of `width` elements in a format, scales included.

    >>> stored_bytes("int8", sympy.Symbol("n"), 64), stored_bytes("int4/128", sympy.Integer(2), 256, packed=True)
    (68*n, 272)
    """

    one, two = (_measured_bytes(form, num_rows, int(width), packed) for num_rows in (1, 2))
    return (two - one) * rows + 2 * one - two


@functools.cache
def _measured_bytes(form: str, num_rows: int, width: int, packed: bool) -> int:
    fmt = parse_format(form)
    codes, *scales = fmt.quantize(torch.empty(num_rows, width, device="meta"))
    return sum(part.nbytes for part in (fmt.pack(codes) if packed else codes, *scales))


def _ways(kernel: Kernel, variant: Variant, beside: str) -> tuple[tuple[Kernel, ...], ...]:
    if kernel.kind == "attention" and variant.attended != 1:
        return ((replace(kernel, flops=kernel.flops * variant.attended),),)
    if kernel.kind == "attention" and beside:
        return (kernel,), (replace(kernel, kind="bf16 attention", beside=beside),)
    name = variant.scheme_of(kernel)
    if name is None:
        return ((kernel,),)
    scheme, (rows, inner, outer) = SCHEMES[name], kernel.shape
    x, y = (rows * n * kernel.dtype.itemsize for n in (inner, outer))
    codes, product = stored_bytes(scheme.activation, rows, inner), 4 * rows * outer
    moved = codes + packed_bytes(kernel, scheme) + product
    return (kernel,), (
        _pointwise(2 * x + codes),
        replace(kernel, kind=name, bytes_moved=moved),
        _pointwise(product + y),
    )


def _pointwise(num_bytes: Expr) -> Kernel:
    return Kernel("pointwise", torch.float32, _ZERO, num_bytes)


def find_regions(gm: fx.GraphModule) -> tuple[Region, tuple[Region, ...]]:
    """Returns what lies outside the blocks of a graph, and its blocks; sizes are named after the inputs they are of."""
    calls = body_calls(gm)
    names = size_names(gm)
    bodies = {str(call.args[1]): _block(body_of(gm, call), names) for call in calls}
    outside = _region("outside", [node for node in gm.graph.nodes if node not in calls], names)
    return outside, tuple(_named(bodies[str(call.args[1])], str(call.meta["block"])) for call in calls)


def _block(body: fx.GraphModule, names: Mapping[Expr, Expr]) -> Region:
    bases = body.meta["bases"]
    linears = {site.node: site.name for site in find_linears(body)[0]}
    formals, nodes = placeholders(body.graph), [node for node in body.graph.nodes if node.op == "call_function"]
    sublayers, _ = find_sublayers(body, bases)
    kinds = [sub.kind for sub in sublayers]
    parts = []
    for i, sub in enumerate(sublayers):
        number = str(kinds[:i].count(sub.kind) + 1) if kinds.count(sub.kind) > 1 else ""
        parts.append(_region(f"/{sub.kind}{number}", sub.nodes, names, linears, (), sub.outputs))
    base_nodes = [formals[base] for base in bases if base is not None]
    return replace(_region("", nodes, names, linears, base_nodes, outputs(body.graph)), parts=tuple(parts))


def _region(
    name: str,
    nodes: Sequence[fx.Node],
    names: Mapping[Expr, Expr],
    linears: Mapping[fx.Node, str] | None = None,
    bases: Sequence[fx.Node] = (),
    results: Sequence[fx.Node] = (),
) -> Region:
    nodes = [node for node in nodes if node.op == "call_function"]

    def named(expr: Expr) -> Expr:
        return expr.xreplace(names)

    def named_kernel(kernel: Kernel) -> Kernel:
        return replace(
            kernel,
            flops=named(kernel.flops),
            bytes_moved=named(kernel.bytes_moved),
            shape=tuple(map(named, kernel.shape)),
            num_special=named(kernel.num_special),
        )

    weights = [node.meta["val"] for node in external_inputs(nodes) if is_parameter(node) and is_tensor(node)]
    residuals = tuple(
        (named(expression(val.numel())), expression(val.shape[-1]), val.dtype) for val in values_of(results)
    )
    return Region(
        name,
        tuple(map(named_kernel, find_kernels(nodes, linears))),
        sum(map(tensor_bytes, weights), start=_ZERO),
        named(sum((tensor_bytes(node.meta["val"]) for node in bases), start=_ZERO)),
        residuals,
    )


def together(name: str, regions: Sequence[Region]) -> Region:
    """Returns several regions that follow each other as one: it continues the stream of the last."""
    kernels = tuple(kernel for region in regions for kernel in region.kernels)
    weight_bytes = sum((region.weight_bytes for region in regions), start=_ZERO)
    return Region(name, kernels, weight_bytes, regions[-1].base_bytes, regions[-1].residuals)


def _named(region: Region, block: str, part: str = "") -> Region:
    """Returns a region of a body as that of a block which calls it."""
    kernels = tuple(
        replace(kernel, linear=name_in(block, kernel.linear)) if kernel.linear else kernel for kernel in region.kernels
    )
    parts = tuple(_named(inner, block, inner.name) for inner in region.parts)
    return replace(region, name=f"{block}{part}", kernels=kernels, parts=parts)


def input_sizes(gm: fx.GraphModule) -> dict[str, Any]:
    """Returns the sizes of a model's inputs, and the integers among them, each with a name such as `x.size(0)`."""
    inputs = [node for node in placeholders(gm.graph) if not is_parameter(node)]
    by_rank = sorted(filter(is_tensor, inputs), key=lambda node: -node.meta["val"].dim())  # the sample names the batch
    tensors = {plain_name(node): node.meta["val"].shape for node in by_rank}
    numbers = {plain_name(node): val for node in inputs if isinstance(val := node.meta["val"], torch.SymInt)}
    return {f"{name}.size({i})": size for name, shape in tensors.items() for i, size in enumerate(shape)} | numbers


def size_names(gm: fx.GraphModule) -> dict[Expr, sympy.Symbol]:
    """Returns for each symbolic size of the inputs a symbol with the name of the first of them."""
    names: dict[Expr, sympy.Symbol] = {}
    for name, size in input_sizes(gm).items():
        if expression(size).is_Symbol:
            names.setdefault(expression(size), sympy.Symbol(name, integer=True, positive=True))
    return names
