"""What a graph costs."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .graph import placeholders


def flops_of(gm: fx.GraphModule) -> float:
    """Counts the floating point operations of one run of a graph, symbolic sizes at their hints.

    Source: torch's FlopCounterMode, run over fake tensors; nothing is computed and no guard is added.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
        inputs = [_concrete(node.meta["val"], mode) for node in placeholders(gm.graph)]
        fx.Interpreter(gm).run(*inputs)
    return float(counter.get_total_flops())


def _concrete(val: Any, mode: FakeTensorMode) -> Any:
    if isinstance(val, torch.Tensor):
        size, stride = ([hint(n) for n in numbers] for numbers in (val.shape, val.stride()))
        with mode:
            return torch.empty_strided(size, stride, dtype=val.dtype, device=val.device)
    return hint(val)


def hint(number: Any) -> Any:
    """Returns the value a symbolic number had when the graph was traced; any other number as it is."""
    return number.node.hint if isinstance(number, (torch.SymInt, torch.SymFloat)) else number
