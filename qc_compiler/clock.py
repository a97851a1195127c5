"""Finds, among the inputs of a graph, the timestep, the sample and the number of frames. Analysis only."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .errors import OptionError
from .graph import is_parameter, is_tensor, placeholders
from .options import Options

_WAVES = {torch.ops.aten.sin.default, torch.ops.aten.cos.default}
_DENSE = {torch.ops.aten.linear.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default}


def find_clock(formals: Sequence[fx.Node], options: Options) -> int | None:
    """Returns the index of the timestep among a graph's inputs, or None.

    It is the small tensor or number whose sine is taken before any linear sees it; of several (a guidance scale is
    embedded alike) the one whose name speaks of time, else the first.

    Raises:
        OptionError: `options.timestep` names no input.
    """
    inputs = [(i, node) for i, node in enumerate(formals) if not is_parameter(node)]
    if options.timestep is not None:
        wanted = [i for i, node in inputs if plain_name(node) == options.timestep]
        if not wanted:
            names = ", ".join(plain_name(node) for _, node in inputs if _is_small(node))
            raise OptionError(f"timestep={options.timestep!r} is no input of the model; small inputs: {names}")
        return wanted[0]
    waved = [(i, node) for i, node in inputs if _is_small(node) and _reaches_a_wave(node)]
    if not waved:
        waved = [(i, node) for i, node in inputs if _is_small(node)]
        waved = [(i, node) for i, node in waved if _speaks_of_time(node)]
    named = [(i, node) for i, node in waved if _speaks_of_time(node)]
    return next((i for i, _ in (*named, *waved)), None)


def plain_name(node: fx.Node) -> str:
    return re.sub(r"^(l|L)_|_$", "", str(node.meta.get("source", node.target))).strip("_")


def _speaks_of_time(node: fx.Node) -> bool:
    return bool(re.search(r"time|sigma|(^|_)t(_|$)", plain_name(node)))


def _is_small(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return val.dim() <= 2 and val.dtype != torch.bool
    return isinstance(val, (torch.SymFloat, float))


def _reaches_a_wave(node: fx.Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current.target in _WAVES:
            return True
        if current not in seen and current.target not in _DENSE:
            seen.add(current)
            todo += [user for user in current.users if len(seen) < 200]
    return False


def find_latent(formals: Sequence[fx.Node], results: Sequence[Any], clock: int | None) -> int | None:
    """Returns the index of the sample that is denoised: shaped like the model's first tensor, else of highest rank."""
    result = next((node for node in results if isinstance(node, fx.Node) and is_tensor(node)), None)
    inputs = [(i, node) for i, node in enumerate(formals) if i != clock and _is_sample(node)]
    for i, node in inputs:
        if result is not None and node.meta["val"].shape == result.meta["val"].shape:
            return i
    rank = max((node.meta["val"].dim() for _, node in inputs), default=0)
    return next((i for i, node in inputs if node.meta["val"].dim() == rank), None)


def _is_sample(node: fx.Node) -> bool:
    val = node.meta["val"]
    return is_tensor(node) and not is_parameter(node) and val.is_floating_point() and val.dim() >= 2


def find_frames(gm: fx.GraphModule) -> int:
    """Returns the frames of a video model's input, 1 for images: the third axis of (B, C, F, H, W).

    Models that put frames second, (B, F, C, H, W), are told by the axis with the fewest channels behind a patch
    convolution; where that is ambiguous, the larger of the two axes is taken for frames.
    """
    for node in placeholders(gm.graph):
        val = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(val, torch.Tensor) and val.dim() == 5 and not is_parameter(node):
            if isinstance(val, torch.nn.Parameter) or node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
                continue
            axes = [n for n in val.shape[1:3] if isinstance(n, int)]
            return max(axes, default=1)
    return 1
