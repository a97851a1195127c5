"""Numerics of the narrow formats in plain torch: the reference that kernels are tested against."""

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Format
from .float8 import Float8
from .integer import Integer, IntegerWithZero
from .nvfp4 import NVFP4

__all__ = ["NVFP4", "Float8", "Format", "Integer", "IntegerWithZero", "decode", "parse_format"]


@functools.cache
def parse_format(name: str) -> Format:
    """Returns the format of a name, such as graphs and files hold it.

    >>> parse_format("int4/128"), parse_format("uint8").name, parse_format("fp8/tensor").name
    (Integer(bits=4, group=128, max_code=7), 'uint8', 'fp8/tensor')

    Raises:
        OptionError: no format has this name.
    """
    if name == "nvfp4":
        return NVFP4()
    kind, _, rest = name.partition("/")
    if kind in ("fp8", "fp8-e5m2") and rest in ("", "tensor"):
        return Float8(torch.float8_e4m3fn if kind == "fp8" else torch.float8_e5m2, bool(rest))
    if found := re.fullmatch(r"(u?)int([2-8])(?:/m(\d+))?(?:/(tensor|\d+))?", name):
        group = -1 if found[4] == "tensor" else int(found[4] or 0)
        return IntegerWithZero(int(found[2]), group) if found[1] else Integer(int(found[2]), group, int(found[3] or 0))
    raise OptionError(
        f"{name!r} is no format: expected nvfp4, fp8, fp8-e5m2, int2 … int8 or uint2 … uint8, with "
        "'/tensor' for one scale or '/128' for groups of 128"
    )


def decode(parts: Sequence[Tensor], form: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
    """Returns x̂ (…, K) from codes and scales in the format named `form`; `size` is K where the codes are packed."""
    codes, *scales = parts
    values = parse_format(form)
    return values.dequantize(codes if size is None else values.unpack(codes, size), *scales).to(dtype)
