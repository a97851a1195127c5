"""NVFP4: E2M1 in blocks of 16, an E4M3 scale for every block, a float32 scale for the tensor.

t = amax|x| / (448·6);  s = t·E4M3(clamp(amax_block / 6 / t, 2⁻⁶, 448));  q = E2M1(x / s), ties to even;  x̂ = s·q
E2M1 = {0, .5, 1, 1.5, 2, 3, 4, 6} and their negatives
|x̂ − x| ≤ max(s / 4, |x| / 5)        half a gap: .25 below 2, and a fifth at 1.25, 2.5 and 5

The smallest block scale is E4M3's smallest normal number; below it, rounding the scale could cost more than the bound.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 2; 6Bit-Diffusion,
arXiv 2603.18742.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, in_groups, scaled
from .integer import ROUNDING

BLOCK = 16
MAX_SCALE, MIN_SCALE = 448.0, 2.0**-6
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 … 7; bit 3 is the sign


@dataclass(frozen=True)
class NVFP4(Format):
    """NVIDIA's 4-bit floating point: 4.5 bits an element with its scales."""

    num_parts: ClassVar[int] = 3
    bits: ClassVar[int] = 4  # type: ignore[misc]

    @property
    def name(self) -> str:
        return "nvfp4"

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns uint8 codes 0 … 15 (…, K), E4M3 scales (…, ⌈K / 16⌉) and the float32 tensor scale ()."""
        blocks = in_groups(x.float(), BLOCK)
        amax = blocks.abs().amax(dim=-1)
        tensor_scale = amax.amax() / (MAX_SCALE * VALUES[-1])
        scales = scaled(amax / VALUES[-1], tensor_scale).clamp(MIN_SCALE, MAX_SCALE).to(torch.float8_e4m3fn)
        values = scaled(blocks, (scales.float() * tensor_scale).unsqueeze(-1))
        return encode(values).flatten(-2)[..., : x.shape[-1]], scales, tensor_scale

    def dequantize(self, *parts: Tensor) -> Tensor:
        codes, scales, tensor_scale = parts
        values = in_groups(decode(codes), BLOCK) * (scales.float() * tensor_scale).unsqueeze(-1)
        return values.flatten(-2)[..., : codes.shape[-1]]

    def bound(self, x: Tensor, *parts: Tensor) -> Tensor:
        scale = (parts[1].float() * parts[2]).repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]
        return torch.maximum(scale / 4, x.float().abs() / 5) * ROUNDING


def encode(values: Tensor) -> Tensor:
    """Rounds to E2M1, ties to even; what is larger than 6 becomes 6.

    >>> encode(torch.tensor([0.25, 0.75, 2.5, 5.0, -9.0])).tolist()
    [0, 2, 4, 6, 15]
    """
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    size = ((size / step).round() * step).clamp(max=VALUES[-1])
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    return (code + 8 * (values < 0)).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Returns the values of E2M1 codes in float32.

    >>> decode(torch.arange(16, dtype=torch.uint8)).tolist()[:8] == list(VALUES)
    True
    """
    code = (codes & 7).float()
    size = torch.where(code < 4, code / 2, torch.where(code < 6, code - 2, 2 * code - 8))
    return torch.where(codes >= 8, -size, size)
