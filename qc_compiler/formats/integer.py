"""Integers with a float32 scale for every row, for groups within a row, or for the whole tensor.

symmetric:   scale = amax|x| / m,            q = clamp(round(x / scale), −m, m),       x̂ = scale·q
zero point:  scale = (hi − lo) / (2ᵇ − 1),   q = clamp(round(x / scale) + z, 0, 2ᵇ − 1),  x̂ = scale·(q − z)
             with lo = min(x, 0), hi = max(x, 0), z = round(−lo / scale); 0 stays exactly 0
|x̂ − x| ≤ scale / 2, for both

m = 2ᵇ⁻¹ − 1. Widths such as 6 bits exist for the accounting of papers: their codes take a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Format, in_groups, scaled

ROUNDING = 1 + 2.0**-14  # float32 arithmetic: a few roundings of quotients up to 255, against half a code


@dataclass(frozen=True)
class Integer(Format):
    """Symmetric integers.

    Attributes:
        bits: 2 … 8.
        group: Elements of a row that share a scale; 0 for whole rows, −1 for the whole tensor.
        max_code: The largest code; a CPU whose 8-bit products saturate needs fewer than the bits allow.
    """

    bits: int = 8
    group: int = 0
    max_code: int = 0

    num_parts: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.max_code:
            object.__setattr__(self, "max_code", 2 ** (self.bits - 1) - 1)

    @property
    def name(self) -> str:
        narrowed = f"/m{self.max_code}" if self.max_code != 2 ** (self.bits - 1) - 1 else ""
        return f"int{self.bits}{narrowed}" + _suffix(self.group)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns int8 codes (…, K) and float32 scales: (…, 1), (…, ⌈K / group⌉) or ()."""
        grouped = _grouped(x.float(), self.group)
        scale = _reduced(torch.amax, grouped.abs(), self.group) / self.max_code
        codes = scaled(grouped, scale).round().clamp(-self.max_code, self.max_code).to(torch.int8)
        return _ungrouped(codes, x, self.group), _stored(scale, self.group)

    def dequantize(self, *parts: Tensor) -> Tensor:
        codes, scale = parts
        return _ungrouped(_grouped(codes.float(), self.group) * _spread(scale, self.group), codes, self.group)

    def bound(self, x: Tensor, *parts: Tensor) -> Tensor:
        return _per_element(parts[1], x, self.group) / 2 * ROUNDING

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        codes = super().unpack(packed, size)
        return codes if self.bits > 4 else ((codes ^ 8).to(torch.int8) - 8)


@dataclass(frozen=True)
class IntegerWithZero(Format):
    """Integers with a zero point: nothing is wasted on a sign where all values lie on one side (behind a GELU).

    Attributes:
        bits, group: As for `Integer`.
    """

    bits: int = 8
    group: int = 0

    num_parts: ClassVar[int] = 3

    @property
    def name(self) -> str:
        return f"uint{self.bits}" + _suffix(self.group)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns uint8 codes (…, K), float32 scales and float32 zero points of the same shape."""
        grouped, top = _grouped(x.float(), self.group), 2**self.bits - 1
        low = _reduced(torch.amin, grouped, self.group).clamp(max=0)
        high = _reduced(torch.amax, grouped, self.group).clamp(min=0)
        scale = (high - low) / top
        zero = scaled(-low, scale).round()
        codes = (scaled(grouped, scale).round() + zero).clamp(0, top).to(torch.uint8)
        return _ungrouped(codes, x, self.group), _stored(scale, self.group), _stored(zero, self.group)

    def dequantize(self, *parts: Tensor) -> Tensor:
        codes, scale, zero = parts
        whole = _grouped(codes.float(), self.group) - _spread(zero, self.group)
        return _ungrouped(whole * _spread(scale, self.group), codes, self.group)

    def bound(self, x: Tensor, *parts: Tensor) -> Tensor:
        return _per_element(parts[1], x, self.group) / 2 * ROUNDING


def _suffix(group: int) -> str:
    return {0: "", -1: "/tensor"}.get(group, f"/{group}")


def _grouped(x: Tensor, group: int) -> Tensor:
    return in_groups(x, group) if group > 0 else x


def _ungrouped(values: Tensor, like: Tensor, group: int) -> Tensor:
    return values.flatten(-2)[..., : like.shape[-1]] if group > 0 else values


def _reduced(reduce: Callable[..., Tensor], x: Tensor, group: int) -> Tensor:
    return reduce(x) if group < 0 else reduce(x, dim=-1, keepdim=True)


def _stored(scale: Tensor, group: int) -> Tensor:
    return scale.squeeze(-1) if group > 0 else scale


def _spread(scale: Tensor, group: int) -> Tensor:
    return scale.unsqueeze(-1) if group > 0 else scale


def _per_element(scale: Tensor, x: Tensor, group: int) -> Tensor:
    if group > 0:
        return scale.repeat_interleave(group, dim=-1)[..., : x.shape[-1]]
    return scale.expand_as(x)
