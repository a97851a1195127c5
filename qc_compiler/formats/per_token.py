"""Symmetric formats with one float32 scale a token: int8 and fp8 E4M3.

scale = amax(|x|, last dimension) / max_code;  q = round(x / scale);  x̂ = q · scale
|x̂ − x| ≤ scale / 2               for int8 (max_code 127)
|x̂ − x| ≤ max(|x| / 17, scale·2⁻¹⁰)  for E4M3 (3 mantissa bits: half a unit of 1/8 at 17/16; max_code 448)
"""

import torch
from torch import Tensor

MAX_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes along the last dimension.

    Args:
        x: (..., D), floating point.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        codes (..., D) of `dtype` and scales (..., 1) in float32; a token of zeros gets the scale 0 and codes 0.
        NaN and Inf make the scale of their token NaN or Inf, so they are seen again after `dequantize_per_token`.
    """
    max_code = MAX_CODE[dtype]
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / max_code
    codes = x / torch.where(scale > 0, scale, 1.0)
    if dtype == torch.int8:
        codes = codes.round()
    return codes.clamp(-max_code, max_code).to(dtype), scale


def dequantize_per_token(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns codes · scale in float32, shape (..., D)."""
    return codes.float() * scale
