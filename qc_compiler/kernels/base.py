"""What a kernel for quantized linears is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats.schemes import Scheme


@dataclass(frozen=True)
class LinearShape:
    """Activations (rows, inner) times a weight (outer, inner), in a model of this dtype."""

    rows: int
    inner: int
    outer: int
    dtype: torch.dtype


class LinearKernel(ABC):
    """One way to multiply quantized activations with a quantized weight on one kind of device.

    Its methods are traced into graphs: `prepare` into what runs once for every version of the weights, `linear` into
    the model. Around the operator that multiplies they are plain torch, which Inductor fuses with its neighbours.
    """

    name: ClassVar[str]
    device: ClassVar[str]

    @abstractmethod
    def takes(self, scheme: Scheme) -> bool:
        """Whether it can multiply what this scheme makes of activations and weights."""

    def fits(self, shape: LinearShape) -> bool:
        """Whether it can multiply operands of this shape."""
        return True

    def narrowed(self, scheme: Scheme) -> Scheme:
        """Returns the scheme as this device can hold it without rounding twice."""
        return scheme

    @abstractmethod
    def prepare(self, parts: Sequence[Tensor], form: str, size: int | None = None) -> tuple[Tensor, ...]:
        """Returns a weight (N, K) as `linear` wants it; `parts` are codes and scales in the format `form`.

        Args:
            parts: As `Format.quantize` returns them.
            form: Their format.
            size: K, where the codes are packed.
        """

    @abstractmethod
    def multiply(self, parts: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
        """Returns the bare product; what `linear` adds to it is fused with its neighbours, so this is what is timed."""

    @abstractmethod
    def linear(
        self, parts: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Returns x̂·ŵᵀ + b, (…, N) in `dtype`; `parts` are the activations (…, K) in the scheme's format."""
