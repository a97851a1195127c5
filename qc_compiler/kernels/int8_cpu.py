"""int8 linear on the CPU: oneDNN multiplies, Inductor fuses what stands before and behind it.

    A[m, n] = s_w[n]·Σ_k q[m, k]·W[n, k]                     oneDNN, int32 inside, float32 out
    y[m, n] = s_x[m]·(A[m, n] − z[m]·c[n]) + b[n]            plain torch, c[n] = s_w[n]·Σ_k W[n, k]

x̂ = s_x·(q − z) has a scale and a zero point a token, ŵ = s_w·W a scale an output channel. y is x̂·ŵᵀ + b up to float32
rounding: |error| ≤ 2⁻²¹·s_x·(|A| + |z·c|) + 2⁻²²·|y|. A weight in another format is cast: |error of ŵ| ≤ s_w / 2.

Without VNNI, oneDNN multiplies u8·s8 with `vpmaddubsw`, which adds two products in 16 bits and saturates silently:
255·127·2 > 32767. With |W| ≤ 63 the sum stays below (255·63·2 = 32130), so weights have 127 levels there.

Measured (1 thread, AVX2 without VNNI, M = 1024, K × N): 1152 × 3456 47 ms against 93 ms in float32, 1152 × 4608 65
against 129, 4608 × 1152 67 against 132. int8 codes in place of uint8 cost oneDNN a tenth more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..formats import Integer, IntegerWithZero, decode, parse_format
from ..formats.schemes import Scheme
from .base import LinearKernel

onednn = torch.ops.onednn


@dataclass(frozen=True)
class Int8CPU(LinearKernel):
    """
    Attributes:
        max_code: The largest weight code whose products the CPU adds without saturating.
    """

    max_code: int

    name = "oneDNN int8"
    device = "cpu"

    @staticmethod
    def here() -> "Int8CPU":
        """Returns the kernel for this machine's CPU."""
        return Int8CPU(127 if torch.cpu._is_vnni_supported() else 63)

    @cached_property
    def weight_format(self) -> Integer:
        return Integer(8, max_code=self.max_code)

    def takes(self, scheme: Scheme) -> bool:
        activation = parse_format(scheme.activation)
        return isinstance(activation, IntegerWithZero) and activation.group == 0 and scheme.weight != "fp8"

    def narrowed(self, scheme: Scheme) -> Scheme:
        weight = parse_format(scheme.weight)
        is_rows = isinstance(weight, Integer) and weight.bits == 8 and weight.group == 0
        return replace(scheme, weight=self.weight_format.name) if is_rows else scheme

    def prepare(self, parts: Sequence[Tensor], form: str, size: int | None = None) -> tuple[Tensor, ...]:
        """Casts ŵ to int8 codes (N, K), scales (N,) and scaled sums of the codes (N,)."""
        codes, scale = self.weight_format.quantize(decode(parts, form, torch.float32, size))
        return codes, scale.squeeze(-1), codes.sum(dim=-1, dtype=torch.float32) * scale.squeeze(-1)

    def multiply(self, parts: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
        return torch.ops.quantcache.int8_matmul(parts[0], weight[0], weight[1])

    def linear(
        self, parts: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        _, x_scale, zero = parts
        y = (self.multiply(parts, weight) - zero * weight[2]) * x_scale
        return (y if bias is None else y + bias).to(dtype)


torch.library.define("quantcache::int8_matmul", "(Tensor codes, Tensor weight, Tensor scale) -> Tensor")


@torch.library.impl("quantcache::int8_matmul", "CPU")
def _int8_matmul(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns A (…, N) for uint8 codes (…, K), int8 weights (N, K) and float32 scales (N,)."""
    packed = _pack(weight)
    rows = codes.reshape(-1, codes.shape[-1])
    y = onednn.qlinear_pointwise(
        rows, 1.0, 0, packed.matrix, scale, packed.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y.view(*codes.shape[:-1], weight.shape[0])


@torch.library.register_fake("quantcache::int8_matmul")
def _(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


@register_flop_formula(torch.ops.quantcache.int8_matmul)
def _flops(codes: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(codes) * weight[0]


class _Packed:
    """A weight in oneDNN's blocked layout, for as long as the weight lives unchanged."""

    def __init__(self, weight: Tensor) -> None:
        self.version = weight._version
        self.matrix = onednn.qlinear_prepack(weight, None)
        self.zeros = torch.zeros(weight.shape[0], dtype=torch.int64)


def _pack(weight: Tensor) -> _Packed:
    packed: _Packed | None = getattr(weight, "_quantcache_packed", None)
    if packed is None or packed.version != weight._version:
        packed = weight._quantcache_packed = _Packed(weight)  # type: ignore[attr-defined]
    return packed
