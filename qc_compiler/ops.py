"""Our operators: what quantization and head-wise attention mean in a graph.

Run as they stand they give the reference result. Those of quantization never reach Inductor: `LowerLinears` turns
`quantize` and `dequantize` into kernels or the plain torch of their format, `BranchChoices` turns `choose` into control
flow. Those of attention do, and call this device's kernel.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from .attention import FULL, ROW, WINDOW, empty_output, like_output
from .formats import decode, parse_format
from .formats.transforms import low_rank as split_low_rank
from .kernels import find_attention


@torch.library.custom_op("quantcache::quantize", mutates_args=())
def _quantize(x: Tensor, form: str) -> list[Tensor]:
    """Returns the parts of x (…, K) in the format named `form`: codes, then scales."""
    return list(parse_format(form).quantize(x))


@torch.library.custom_op("quantcache::dequantize", mutates_args=())
def _dequantize(parts: list[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    """Returns x̂ (…, K) in `dtype`; `size` is K where the codes are packed."""
    return decode(parts, form, dtype, size)


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


@torch.library.custom_op("quantcache::headwise_attention", mutates_args=())
def _headwise_attention(
    query: Tensor, key: Tensor, value: Tensor, modes: Tensor, kept: Tensor | None, num_text: int, scale: float
) -> Tensor:
    """Returns attention whose heads do what `modes` says: (B, H, S, D), in memory (B, S, H, D).

    Args:
        query, key, value: (B, H, S, D).
        modes: int32 (2, H) on the CPU, as in `qc_compiler.attention`.
        kept: (B, N, S, D), the last outputs of the heads that are ever cached; None if there are none.
        num_text: T if the text comes first, −T if it comes last.
        scale: Of the scores.
    """
    if _observers:
        return _observers[-1](query, key, value, modes, kept, num_text, scale)
    return attend(query, key, value, modes, kept, num_text, scale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, modes: Tensor, kept: Tensor | None, num_text: int, scale: float
) -> Tensor:
    """Returns what `headwise_attention` does, by this device's kernel."""
    if (modes[WINDOW] == FULL).all():
        return like_output(F.scaled_dot_product_attention(query, key, value, scale=scale))
    return find_attention(query.device)(query, key, value, modes[WINDOW], modes[ROW], kept, num_text, scale)


@_headwise_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, modes: Tensor, kept: Tensor | None, num_text: int, scale: float
) -> Tensor:
    return empty_output(query)


@register_flop_formula(torch.ops.quantcache.headwise_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)  # of full heads: what they do is known when they run


@torch.library.custom_op("quantcache::store_heads", mutates_args=())
def _store_heads(output: Tensor, modes: Tensor, count: int) -> Tensor:
    """Returns those N heads of `output` (B, H, S, D) that are ever cached, (B, N, S, D), in the order of their rows."""
    rows = modes[ROW].tolist()
    return output[:, [rows.index(row) for row in range(count)]].contiguous()


@_store_heads.register_fake
def _(output: Tensor, modes: Tensor, count: int) -> Tensor:
    batch, _, tokens, width = output.shape
    return output.new_empty(batch, count, tokens, width)


@torch.library.custom_op("quantcache::load_heads", mutates_args=())
def _load_heads(kept: Tensor, modes: Tensor) -> Tensor:
    """Returns attention whose heads are all cached: (B, H, S, D), in memory (B, S, H, D)."""
    return like_output(kept[:, modes[ROW].tolist()])


@_load_heads.register_fake
def _(kept: Tensor, modes: Tensor) -> Tensor:
    return empty_output(kept[:, :1].expand(-1, modes.shape[1], -1, -1))


_observers: list[Callable[..., Tensor]] = []


@contextlib.contextmanager
def observed(observer: Callable[..., Tensor]) -> Iterator[None]:
    """Gives every `headwise_attention` inside to `observer`, with its operands; calibration looks at heads so."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


quantize = torch.ops.quantcache.quantize.default
dequantize = torch.ops.quantcache.dequantize.default
low_rank = torch.ops.quantcache.low_rank.default
choose = torch.ops.quantcache.choose.default
headwise_attention = torch.ops.quantcache.headwise_attention.default
store_heads = torch.ops.quantcache.store_heads.default
load_heads = torch.ops.quantcache.load_heads.default
