"""The guard of one region: its algebra, and the subgraph `cond(compute | reuse)` built from it.

With x the stream that enters a region, y the one that leaves it, Δ = y − x, and s₀, s₁, … the residuals of the last
computed steps (newest first):

    compute:  y = f(x);  Δ goes to the slot;  statistics of x, Δ, s₀ go to the region's row
    reuse:    y = x + Σⱼ wⱼ·sⱼ;  what goes to the slot is unwritten memory that the runtime drops

w comes from the host: (1) repeats the last residual, (1 + h, −h) extrapolates in a straight line, and so on: any
order and any spacing of steps without a change of the graph.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import Max

from .formats.per_token import dequantize_per_token, quantize_per_token
from .graph import Statistic, cond, fake_mode_of, outputs, placeholders, trace, values_of

_TINY = 1e-12


@dataclass(frozen=True)
class Guard:
    """How one region is cached.

    Attributes:
        bases: For each result of the region the index of the operand that it is a residual of; None caches the
            result itself.
        depth: How many residuals a slot remembers, newest first.
        dtype: None stores residuals as they are; int8 or fp8 as codes and a scale a token.
        num_frames: Frames of the video, for the motion statistic; 1 for images.
    """

    bases: tuple[int | None, ...]
    depth: int = 1
    dtype: torch.dtype | None = None
    num_frames: int = 1

    def build(
        self, compute: Callable[..., Any], operands: Sequence[Any]
    ) -> tuple[fx.GraphModule, list[tuple[Tensor, ...]]]:
        """Builds body(*operands, *slots, weights, predicate) → (*results, *new slot values, statistics).

        Args:
            compute: The region: operands → tuple of results. It is traced.
            operands: Fake tensors and SymInts.

        Returns:
            The body, and the fake tensors that store one residual of each result.
        """
        with fake_mode_of(operands), torch.no_grad():
            results = tuple(compute(*operands))
            encoded = self.encode(self.residuals(operands, results))
            weights = torch.empty(self.depth, dtype=torch.float32, device=results[0].device)
        slots = self.slot_values(encoded)
        stored_kinds = [value for values in encoded for value in values]
        num_operands = len(operands)

        def computed(*args: Any) -> tuple[Tensor, ...]:
            xs, stored = args[:num_operands], args[num_operands:-1]
            ys = tuple(compute(*xs))
            return (*ys, *self.observe(xs, ys, stored))

        def reused(*args: Any) -> tuple[Tensor, ...]:
            xs, stored = args[:num_operands], args[num_operands:-1]
            ys = self.extrapolate(xs, [y.dtype for y in results], stored, args[-1])
            return (*ys, *unwritten(stored_kinds)(*stored), torch.zeros(len(Statistic), device=weights.device))

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
        if self.dtype is None:
            return [(residual,) for residual in residuals]
        return [quantize_per_token(residual, self.dtype) for residual in residuals]

    def decode(self, stored: Sequence[Tensor], age: int) -> list[Tensor]:
        """Returns the residuals (float32) that were computed `age` computed steps before the newest."""
        width = 1 if self.dtype is None else 2
        start, count = age * len(self.bases) * width, len(self.bases) * width
        flat = stored[start : start + count]
        if self.dtype is None:
            return [value.float() for value in flat]
        return [dequantize_per_token(codes, scale) for codes, scale in zip(flat[::2], flat[1::2])]

    def observe(self, operands: Sequence[Any], results: Sequence[Tensor], stored: Sequence[Tensor]) -> list[Tensor]:
        """Returns what a computed step leaves behind: new slot values, then the row of statistics."""
        residuals = self.residuals(operands, results)
        inputs = [None if base is None else operands[base] for base in self.bases]
        row = statistics(inputs, residuals, self.decode(stored, 0), self.num_frames)
        return [*(value for values in self.encode(residuals) for value in values), row]

    def extrapolate(
        self,
        operands: Sequence[Any],
        dtypes: Sequence[torch.dtype],
        stored: Sequence[Tensor],
        weights: Tensor,
    ) -> list[Tensor]:
        """Returns y = x + Σⱼ wⱼ·sⱼ for every result, summed in float32."""
        history = [self.decode(stored, age) for age in range(self.depth)]
        results = []
        for k, (base, dtype) in enumerate(zip(self.bases, dtypes)):
            total = weights[0] * history[0][k]
            for age in range(1, self.depth):
                total = total + weights[age] * history[age][k]
            results.append((total if base is None else operands[base].float() + total).to(dtype))
        return results


def statistics(
    inputs: Sequence[Tensor | None], residuals: Sequence[Tensor], cached: Sequence[Tensor], num_frames: int
) -> Tensor:
    """Returns the row of `Statistic`s (float32) of a region, over all its streams together.

    Args:
        inputs: The stream that enters, or None where the cached value has no base (then GAMMA and COSINE compare
            with the cached value instead).
        residuals: Δ of each stream, in the model's dtype.
        cached: The newest cached Δ of each stream.
        num_frames: See `motion`.
    """
    deltas = [residual.float() for residual in residuals]
    before = [old if x is None else x.float() for x, old in zip(inputs, cached)]
    after = [new if x is None else x.float() + new for x, new in zip(inputs, deltas)]
    size_delta, size_cached, size_before = (_total(t.abs() for t in ts) for ts in (deltas, cached, before))
    change = _total((new - old).abs() for new, old in zip(deltas, cached))
    dot = _total(x * y for x, y in zip(before, after))
    norms = _total(x * x for x in before).sqrt() * _total(y * y for y in after).sqrt()
    row = {
        Statistic.GAMMA: size_delta / (size_before + _TINY),
        Statistic.CHANGE: change / (size_cached + _TINY),
        Statistic.MAGNITUDE: size_delta / (size_cached + _TINY),
        Statistic.COSINE: dot / (norms + _TINY),
        Statistic.MOTION: motion(deltas[-1], num_frames),
    }
    return torch.stack([row[column] for column in Statistic])


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, (tensor.sum() for tensor in tensors))


def motion(delta: Tensor, num_frames: int) -> Tensor:
    """Returns Σ|r[f+1] − r[f]| / Σ(|r[f+1]| + |r[f]|) over the frames of a residual, 0-d; 1 where none are known.

    Args:
        delta: Tokens as (B·F, S, D), as (B·S, F, D), or as (B, F·S, D) in raster order.
        num_frames: F; 1 for images.

    Source: the motion factor of HLC, arXiv 2503.06545, Eq. 5, normalized so that it is free of units.
    """
    if num_frames > 1 and delta.dim() == 3:
        rows, tokens, width = delta.shape
        video = None
        if isinstance(tokens, int) and tokens % num_frames == 0:
            video = delta.reshape(rows, num_frames, -1, width)
        elif isinstance(rows, int) and rows % num_frames == 0:
            video = delta.reshape(-1, num_frames, tokens, width)
        if video is not None:
            ahead, behind = video[:, 1:], video[:, :-1]
            return (ahead - behind).abs().sum() / (ahead.abs().sum() + behind.abs().sum() + _TINY)
    return torch.ones((), dtype=torch.float32, device=delta.device)


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
