"""The guard of one region: its algebra, and the subgraph `cond(compute | reuse)` built from it.

With x the stream that enters a region, y the one that leaves it, Δ = y − x, and s₀, s₁, … the residuals of the last
computed steps (newest first):

    compute:  y = f(x);  Δ goes to the slot;  sums over x, y, Δ, s₀ go to the region's row
    reuse:    y = x + Σⱼ wⱼ·sⱼ;  what goes to the slot is unwritten memory that the runtime drops

w comes from the host: (1) repeats the last residual, (1 + h, −h) extrapolates in a straight line, and so on: any
order and any spacing of steps without a change of the graph.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import Max

from .formats import Format
from .graph import cond, fake_mode_of, outputs, placeholders, trace, values_of
from .statistics import Sum, region_sums


@dataclass(frozen=True)
class Guard:
    """How one region is cached.

    Attributes:
        bases: For each result of the region the index of the operand that it is a residual of; None caches the
            result itself. Results behind these are slots of its own (kept attention heads): unwritten at a reuse.
        depth: How many residuals a slot remembers, newest first.
        storage: None stores residuals as they are; a format as codes and scales.
        num_frames: Frames of the video, for the motion statistic; 1 for images.
    """

    bases: tuple[int | None, ...]
    depth: int = 1
    storage: Format | None = None
    num_frames: int = 1

    def build(
        self, compute: Callable[..., Any], operands: Sequence[Any]
    ) -> tuple[fx.GraphModule, list[tuple[Tensor, ...]]]:
        """Builds body(*operands, *slots, weights, predicate) → (*results, *new slot values, sums).

        Args:
            compute: The region: operands → tuple of results. It is traced.
            operands: Fake tensors and SymInts.

        Returns:
            The body, and the fake tensors that store one residual of each result.
        """
        with fake_mode_of(operands), torch.no_grad():
            results = tuple(compute(*operands))
            encoded = self.encode(self.residuals(operands, results))
            count, own = len(self.bases), results[len(self.bases) :]
            weights, sums = (
                torch.empty(n, dtype=torch.float32, device=results[0].device) for n in (self.depth, len(Sum))
            )
        slots = self.slot_values(encoded)
        left_behind = [*(value for values in encoded for value in values), sums]
        num_operands = len(operands)

        def computed(*args: Any) -> tuple[Tensor, ...]:
            xs, stored = args[:num_operands], args[num_operands:-1]
            ys = tuple(compute(*xs))
            return (*ys, *self.observe(xs, ys[:count], stored))

        def reused(*args: Any) -> tuple[Tensor, ...]:
            xs, stored = args[:num_operands], args[num_operands:-1]
            ys = self.extrapolate(xs, [y.dtype for y in results[:count]], stored, args[-1])
            return (*ys, *unwritten([*own, *left_behind])(*stored))

        return cond_body(computed, reused, [*operands, *slots, weights]), encoded

    def slot_values(self, encoded: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """Returns a region's slot operands in their order: by age, then by result, then codes before scales."""
        return [value for _ in range(self.depth) for values in encoded for value in values]

    def residuals(self, operands: Sequence[Any], results: Sequence[Tensor]) -> list[Tensor]:
        """Returns Δ of each result, contiguous as slots are."""
        plain = torch.contiguous_format
        pairs = zip(results, self.bases)
        return [
            y.clone(memory_format=plain) if base is None else (y - operands[base]).contiguous() for y, base in pairs
        ]

    def encode(self, residuals: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        if self.storage is None:
            return [(residual,) for residual in residuals]
        return [self.storage.quantize(residual) for residual in residuals]

    def decode(self, stored: Sequence[Tensor], age: int) -> list[Tensor]:
        """Returns the residuals that were computed `age` computed steps before the newest."""
        width = 1 if self.storage is None else self.storage.num_parts
        start, count = age * len(self.bases) * width, len(self.bases) * width
        flat = stored[start : start + count]
        if self.storage is None:
            return list(flat)
        return [self.storage.dequantize(*flat[i : i + width]) for i in range(0, count, width)]

    def observe(self, operands: Sequence[Any], results: Sequence[Tensor], stored: Sequence[Tensor]) -> list[Tensor]:
        """Returns what a computed step leaves behind: new slot values, then the sums."""
        residuals, cached = self.residuals(operands, results), self.decode(stored, 0)
        before = [old if base is None else operands[base] for old, base in zip(cached, self.bases)]
        sums = region_sums(before, list(results), residuals, cached, self.num_frames)
        return [*(value for values in self.encode(residuals) for value in values), sums]

    def extrapolate(
        self,
        operands: Sequence[Any],
        dtypes: Sequence[torch.dtype],
        stored: Sequence[Tensor],
        weights: Tensor,
    ) -> list[Tensor]:
        """Returns y = x + Σⱼ wⱼ·sⱼ for every result, summed in float32."""
        history = [[value.float() for value in self.decode(stored, age)] for age in range(self.depth)]
        results = []
        for k, (base, dtype) in enumerate(zip(self.bases, dtypes)):
            total = weights[0] * history[0][k]
            for age in range(1, self.depth):
                total = total + weights[age] * history[age][k]
            results.append((total if base is None else operands[base].float() + total).to(dtype))
        return results


def unwritten(results: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function of operands that allocates tensors like `results`, contiguous, and leaves them unwritten.

    Symbolic sizes are read off the operands, since a tracer knows no others.
    """
    kinds = [(tuple(v.shape), v.dtype, v.device) for v in results]

    def allocate(*operands: Any) -> tuple[Tensor, ...]:
        sizes = [n for x in operands for n in (x.shape if isinstance(x, Tensor) else [x])]
        known = {n.node.expr: n for n in sizes if isinstance(n, torch.SymInt)}
        return tuple(
            torch.empty(
                [known[n.node.expr] if isinstance(n, torch.SymInt) else n for n in shape], dtype=dtype, device=device
            )
            for shape, dtype, device in kinds
        )

    return allocate


def cond_body(computed: Callable[..., Any], other: Callable[..., Any], operands: Sequence[Any]) -> fx.GraphModule:
    """Builds body(*operands, predicate) → cond(predicate, computed, other); both functions are traced."""
    branches = [trace(_with_simple_strides(branch), *operands) for branch in (computed, other)]
    graph = fx.Graph()
    formals = []
    for node in placeholders(branches[0].graph):
        formals.append(graph.placeholder(node.name))
        formals[-1].meta["val"] = node.meta["val"]
    predicate = graph.placeholder("predicate")
    with fake_mode_of(operands):
        predicate.meta["val"] = torch.empty((), dtype=torch.bool)
    attrs = [graph.get_attr("compute"), graph.get_attr("reuse")]
    both = graph.call_function(cond, (predicate, *attrs, tuple(formals)))
    both.meta["val"] = tuple(values_of(outputs(branches[0].graph)))
    items = []
    for i, val in enumerate(both.meta["val"]):
        items.append(graph.call_function(operator.getitem, (both, i)))
        items[-1].meta["val"] = val
    graph.output(tuple(items))
    return fx.GraphModule({"compute": branches[0], "reuse": branches[1]}, graph)


def _with_simple_strides(branch: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a branch return tensors whose strides are products of their sizes, as torch's `cond` demands.

    A new tensor of symbolic size (B, (H // 2)², C) has a stride C·Max(1, (H // 2)²), which is refused.
    """

    def simple(value: Any) -> Any:
        if not any(isinstance(n, torch.SymInt) and n.node.expr.has(Max) for n in value.stride()):
            return value
        strides: list[Any] = [1]
        for size in value.shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        return value.as_strided(value.shape, strides)

    return lambda *operands: tuple(simple(value) for value in branch(*operands))
