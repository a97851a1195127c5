"""What a narrow number format is."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Format(ABC):
    """A narrow number format, in plain torch: the reference that kernels are tested against.

    It works along the last dimension: the rows of a weight (N, K) are its output channels, those of an activation
    (…, K) its tokens. `quantize` and `dequantize` compute in float32, so a value that float32 cannot tell from zero is
    zero. NaN and Inf make their scale NaN or Inf: they are seen again after `dequantize`, never lost.

    Attributes:
        num_parts: How many tensors store one quantized tensor; the codes come first.
        bits: Bits of one code.
    """

    num_parts: ClassVar[int]
    bits: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The format's name in options, plans, graphs and files."""

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns codes (…, K), then scales; x is (…, K), floating point."""

    @abstractmethod
    def dequantize(self, *parts: Tensor) -> Tensor:
        """Returns x̂ in float32, (…, K)."""

    @abstractmethod
    def bound(self, x: Tensor, *parts: Tensor) -> Tensor:
        """Returns the documented bound on |x̂ − x| for every element of x, where `parts` are x quantized."""

    def pack(self, codes: Tensor) -> Tensor:
        """Returns codes as they are kept in memory; 4-bit codes share a byte, the even one in the low half."""
        if self.bits > 4:
            return codes
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 0xF
        return codes[..., ::2] | codes[..., 1::2] << 4

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """Undoes `pack`; `size` is K."""
        if self.bits > 4:
            return packed
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :size]

    def round_trip(self, x: Tensor) -> Tensor:
        """Returns x̂ in the dtype of x."""
        return self.dequantize(*self.quantize(x)).to(x.dtype)


def in_groups(x: Tensor, group: int) -> Tensor:
    """Returns x (…, K) as (…, ⌈K / group⌉, group), zeros added at the end."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Returns x / scale, and x itself where the scale is 0 (then x is 0, too)."""
    return x / torch.where(scale == 0, 1.0, scale)
