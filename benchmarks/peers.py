"""Other people's quantization of the same linears, to compare with. Needs `pip install "quantcache[peers]"`.

torchao 0.18.0, its int8 dynamic quantization: symmetric int8 codes, a scale for every row of a weight and for every
token. It runs eagerly on the CPU with torch 2.13.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def torchao_int8_dynamic(model: Model) -> Model:
    """Returns a copy of a model whose blocks have torchao's int8 linears, where `quantize="w8a8"` has ours.

    Raises:
        ImportError: torchao is missing, or older than the configuration used here.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError('torchao cannot be imported: pip install "quantcache[peers]"') from error

    model = copy.deepcopy(model)
    # torchao would otherwise change Inductor's settings for the whole process, and so what ours compiles to
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=is_block_linear)
    return model


@contextmanager
def fast_int_mm() -> Iterator[None]:
    """Replaces `torch._int_mm`, 80× slower than float32 on a CPU without VNNI, by a float32 product.

    Exact up to 1040 inputs, whose sum of products stays below 2²⁴.
    """
    original = torch._int_mm
    torch._int_mm = lambda a, b: (a.float() @ b.float()).int()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._int_mm = original  # type: ignore[assignment]


def is_block_linear(module: nn.Module, name: str) -> bool:
    """Says whether a module is a linear in a list of blocks that sees more than one row a sample.

    >>> [is_block_linear(nn.Linear(4, 4), name) for name in ("spatial_blocks.0.attn.qkv", "t_block.1")]
    [True, False]
    >>> is_block_linear(nn.Linear(4, 4), "blocks.0.modulation")  # one row a sample
    False
    """
    in_block = re.match(r"(\w+_)?blocks\.\d+\.", name) is not None
    return isinstance(module, nn.Linear) and in_block and not name.endswith("modulation")
