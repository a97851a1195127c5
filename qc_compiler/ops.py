"""Our operators: what quantization means in a graph.

Run as they stand they give the reference result. They never reach Inductor: `LowerLinears` turns `quantize` and
`dequantize` into kernels or the plain torch of their format, `BranchChoices` turns `choose` into control flow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import parse_format
from .formats.transforms import low_rank as split_low_rank


@torch.library.custom_op("quantcache::quantize", mutates_args=())
def _quantize(x: Tensor, form: str) -> list[Tensor]:
    """Returns the parts of x (…, K) in the format named `form`: codes, then scales."""
    return list(parse_format(form).quantize(x))


@torch.library.custom_op("quantcache::dequantize", mutates_args=())
def _dequantize(parts: list[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    """Returns x̂ (…, K) in `dtype`; `size` is K where the codes are packed."""
    return decode(parts, form, dtype, size)


def decode(parts: Sequence[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    """Returns what `dequantize` does, in plain torch."""
    codes, *scales = parts
    values = parse_format(form)
    return values.dequantize(codes if size is None else values.unpack(codes, size), *scales).to(dtype)


@torch.library.custom_op("quantcache::low_rank", mutates_args=())
def _low_rank(weight: Tensor, rank: int) -> list[Tensor]:
    """Returns up (N, r), down (r, K) and the residual (N, K) of a weight."""
    return list(split_low_rank(weight, rank))


@_low_rank.register_fake
def _(weight: Tensor, rank: int) -> list[Tensor]:
    outer, inner = weight.shape
    rank = min(rank, outer, inner)
    return [weight.new_empty(outer, rank), weight.new_empty(rank, inner), weight.new_empty(outer, inner)]


@torch.library.custom_op("quantcache::choose", mutates_args=())
def _choose(low: Tensor, high: Tensor, flag: Tensor) -> Tensor:
    """Returns a copy of `high` where the CPU boolean `flag` () is set, else of `low`."""
    return (high if flag else low).clone(memory_format=torch.contiguous_format)


@_choose.register_fake
def _(low: Tensor, high: Tensor, flag: Tensor) -> Tensor:
    return low.clone(memory_format=torch.contiguous_format)


@_quantize.register_fake
def _(x: Tensor, form: str) -> list[Tensor]:
    return list(parse_format(form).quantize(x))


@_dequantize.register_fake
def _(parts: list[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    return decode(parts, form, dtype, size)


quantize = torch.ops.quantcache.quantize.default
dequantize = torch.ops.quantcache.dequantize.default
low_rank = torch.ops.quantcache.low_rank.default
choose = torch.ops.quantcache.choose.default
