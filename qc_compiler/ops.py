"""Our operators: what quantization means in a graph, and the kernels that a lowered graph calls.

`quantize` and `dequantize` are the semantics: run as they stand they give the reference result. They never reach
Inductor; `LowerLinears` turns them into kernels, or into the plain torch of their format.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import parse_format


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


@_quantize.register_fake
def _(x: Tensor, form: str) -> list[Tensor]:
    return list(parse_format(form).quantize(x))


@_dequantize.register_fake
def _(parts: list[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    return decode(parts, form, dtype, size)


quantize = torch.ops.quantcache.quantize.default
dequantize = torch.ops.quantcache.dequantize.default
