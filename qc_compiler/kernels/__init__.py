"""Kernels for quantized linears and head-wise attention, one family a file, and the choice between them."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ..formats import parse_format
from ..formats.schemes import PLAIN, Scheme
from .base import LinearKernel, LinearShape
from .int8_cpu import Int8CPU
from .scaled_mm import ScaledMM
from .timing import fastest

__all__ = ["LinearKernel", "LinearShape", "find_attention", "find_kernel", "find_rotating_quantizer"]


def find_kernel(scheme: Scheme, device: torch.device, shape: LinearShape | None = None) -> LinearKernel | None:
    """Returns the kernel that multiplies what this scheme makes, or None if this device has none.

    Where several do and a shape is given, the one that was measured to be the fastest for it.
    """
    plain = scheme.activation == PLAIN
    kernels = [] if plain else [kernel for kernel in _kernels(device) if kernel.takes(scheme)]
    if shape is None:
        return kernels[0] if kernels else None
    return fastest([kernel for kernel in kernels if kernel.fits(shape)], scheme, shape, device)


def find_rotating_quantizer(form: str, device: torch.device) -> Callable[[Tensor, str, int], list[Tensor]] | None:
    """Returns the kernel that rotates and quantizes to this format at once, or None if this device has none."""
    if device.type == "cuda" and find_spec("triton"):
        from .triton_quantize import can_quantize, triton_quantize

        if can_quantize(parse_format(form)):
            return triton_quantize
    return None


def find_attention(device: torch.device) -> Callable[..., Tensor]:
    """Returns this device's kernel for heads that do different things."""
    if device.type == "cuda" and find_spec("triton"):
        from .triton_attention import triton_attention

        return triton_attention
    from .cpu_attention import cpu_attention

    return cpu_attention


def _kernels(device: torch.device) -> list[LinearKernel]:
    if device.type == "cpu":
        return [Int8CPU.here()]
    kernels: list[LinearKernel] = []
    if device.type == "cuda":
        has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        if find_spec("triton"):
            from .triton_linear import TritonLinear

            kernels.append(TritonLinear(has_fp8))
        if has_fp8:
            kernels.append(ScaledMM())
    return kernels
