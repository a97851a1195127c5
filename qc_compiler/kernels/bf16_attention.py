"""Attention on the CPU with products of bfloat16: for float32 models whose linears are quantized anyway.

    S = Q̂·K̂ᵀ        q̂ = bf16(s·q), k̂ = bf16(k), sums in float32
    P̂ = bf16(exp(S − max))
    o = Σⱼ P̂ⱼ·v̂ⱼ / Σⱼ P̂ⱼ        v̂ = bf16(v)

With the unit roundoff u = 2⁻⁸ scores are off by ε ≤ (2u + u² + 2⁻¹⁶)·|s|·Σ|q·k|, weights before they are normalized by
factors whose quotients are at most R = e²ᵋ·(1 + ū) / (1 − ū), ū = u + 2⁻¹⁴ (exp), and outputs of N keys by

    |o − exact| ≤ (2·(√R − 1) / (√R + 1) + u + N·2⁻²³)·max|v|

Keys and values are packed once into pairs, as VDPBF16PS adds two products a lane. Eight queries at a time pass over
tiles of 256 keys, whose scores stay in the first cache, with the maximum so far (FlashAttention, arXiv 2205.14135).

Measured (1 thread, AMD EPYC with AVX-512 BF16, B × H × S × D, ms; the error is that of normal operands):

                                            2×6×1040×24    2×4×1024×32    2×4×1024×64    1×2×4096×128    64×4×64×32
    scaled_dot_product_attention, float32          26.5           18.7           31.6           209.3           4.2
    the same, bfloat16                                –           19.9              –               –             –
    this                                           11.5            8.9           14.3            94.7           2.4
    relative error                               0.0035         0.0035         0.0034          0.0034        0.0032

The exponential is a tenth of that. Twelve rows at a time or tiles of 512 and 1024 keys are no faster.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from ..attention import empty_output

WIDEST = 128
"""Features of a head that the kernel's registers and caches are for."""
FEW = 32
"""Fewer keys are not worth packing."""


@functools.cache
def has_bf16_attention(device: torch.device) -> bool:
    """Whether this device has the kernel: a CPU with AVX-512 BF16 and the compiler that Inductor uses."""
    if device.type != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return False
    try:
        _library()
    except Exception as error:
        warnings.warn(f"quantcache: attention stays in float32, its kernel does not compile: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp").read_text()
    library: ctypes.CDLL = CppCodeCache.load(source)
    library.attention.restype = None
    return library


torch.library.define("quantcache::bf16_attention", "(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")
bf16_attention = torch.ops.quantcache.bf16_attention.default


@torch.library.impl("quantcache::bf16_attention", "CPU")
def _bf16_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Returns float32 (B, H, M, D), in memory (B, M, H, D).

    Args:
        query: float32 (B, H, M, D), D at most `WIDEST`.
        key, value: float32 (B, H, N, D).
        scale: Of the scores, before the softmax.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    out = empty_output(query)
    packed = torch.empty(batch * heads, _padded(keys, 32), -(-width // 2) + _padded(width, 16) // 2, dtype=torch.int32)
    tensors = query, key, value, out
    _library().attention(
        *(ctypes.c_void_p(x.data_ptr()) for x in (*tensors, packed)),
        (ctypes.c_long * 5)(batch, heads, queries, keys, width),
        (ctypes.c_long * 12)(*(stride for x in tensors for stride in x.stride()[:3])),
        ctypes.c_float(scale),
        torch.get_num_threads(),
    )
    return out


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@torch.library.register_fake("quantcache::bf16_attention")
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return empty_output(query)


@register_flop_formula(torch.ops.quantcache.bf16_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)
