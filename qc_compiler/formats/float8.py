"""8-bit floating point with a float32 scale for every row, or for the whole tensor.

scale = amax|x| / top;  q = cast(x / scale);  x̂ = scale·q

E4M3: top 448,   |x̂ − x| ≤ max(|x| / 17, scale·2⁻¹⁰)     half a unit of 1/8 at 17/16; half the smallest number
E5M2: top 57344, |x̂ − x| ≤ max(|x| / 9,  scale·2⁻¹⁷)     half a unit of 1/4 at 9/8

Source: OCP 8-bit Floating Point Specification 1.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, scaled
from .integer import ROUNDING

_TOP = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_BOUND = {torch.float8_e4m3fn: (17, 2.0**-10), torch.float8_e5m2: (9, 2.0**-17)}


@dataclass(frozen=True)
class Float8(Format):
    """
    Attributes:
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        per_tensor: One scale for the whole tensor instead of one a row.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    per_tensor: bool = False

    num_parts: ClassVar[int] = 2
    bits: ClassVar[int] = 8  # type: ignore[misc]

    @property
    def name(self) -> str:
        kind = "fp8" if self.dtype == torch.float8_e4m3fn else "fp8-e5m2"
        return kind + ("/tensor" if self.per_tensor else "")

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns fp8 codes (…, K) and float32 scales, (…, 1) or ()."""
        x, top = x.float(), _TOP[self.dtype]
        scale = (x.abs().amax() if self.per_tensor else x.abs().amax(dim=-1, keepdim=True)) / top
        return scaled(x, scale).clamp(-top, top).to(self.dtype), scale

    def dequantize(self, *parts: Tensor) -> Tensor:
        codes, scale = parts
        return codes.float() * scale

    def bound(self, x: Tensor, *parts: Tensor) -> Tensor:
        relative, smallest = _BOUND[self.dtype]
        return torch.maximum(x.float().abs() / relative, parts[1] * smallest) * ROUNDING
