"""Kernels for quantized linears, one family a file, and the choice between them."""

from importlib.util import find_spec

import torch

from ..formats.schemes import Scheme
from .base import LinearKernel
from .int8_cpu import Int8CPU

__all__ = ["LinearKernel", "find_kernel"]


def find_kernel(scheme: Scheme, device: torch.device) -> LinearKernel | None:
    """Returns the kernel that multiplies what this scheme makes, or None if this device has none."""
    kernel: LinearKernel | None = None
    if device.type == "cpu":
        kernel = Int8CPU.here()
    elif device.type == "cuda" and find_spec("triton"):
        from .triton_linear import TritonLinear

        kernel = TritonLinear()
    return kernel if kernel is not None and kernel.takes(scheme) else None
