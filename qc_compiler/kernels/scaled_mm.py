"""fp8 linear by `torch._scaled_mm`: the vendor's kernel, a candidate beside Triton's.

    y[m, n] = s_x[m]·s_w[n]·Σ_k q_x[m, k]·q_w[n, k] + b[n]        scales a row of either operand, bfloat16 out

Error: that of fp8 sums (`triton_linear` says which), and one rounding to bfloat16. Run on the CPU, on no GPU yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.schemes import Scheme
from .base import LinearKernel, LinearShape

ALIGNMENT = 16  # of K and N


@dataclass(frozen=True)
class ScaledMM(LinearKernel):
    """For CUDA devices that multiply fp8 (capability 8.9), and models in bfloat16."""

    name = "_scaled_mm"
    device = "cuda"

    def takes(self, scheme: Scheme) -> bool:
        return (scheme.weight, scheme.activation) == ("fp8", "fp8")

    def fits(self, shape: LinearShape) -> bool:
        is_aligned = shape.inner % ALIGNMENT == 0 and shape.outer % ALIGNMENT == 0
        return is_aligned and shape.dtype == torch.bfloat16  # with a scale a row the result has no other dtype

    def prepare(self, parts: Sequence[Tensor], form: str, size: int | None = None) -> tuple[Tensor, ...]:
        codes, scale = parts
        return codes.contiguous(), scale.contiguous()

    def multiply(self, parts: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
        return self.linear(parts, weight, None, torch.bfloat16)

    def linear(
        self, parts: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = parts
        rows = codes.reshape(-1, codes.shape[-1]).contiguous()
        y = torch._scaled_mm(
            rows,
            weight[0].t(),
            scale_a=scale.reshape(-1, 1).contiguous(),
            scale_b=weight[1].reshape(1, -1),
            bias=bias,
            out_dtype=dtype,
        )
        return y.view(*codes.shape[:-1], -1)
