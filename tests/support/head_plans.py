"""Plans for attention heads, and `tiny_dit` with its attention written out: dense masks, Python's own caches."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qc_compiler.attention import CACHED, FULL
from qc_compiler.plan import HeadPlan, Plan
from tiny_models import TinyDiT

BLANK = HeadPlan((), np.zeros((1, 1, 0, 0), dtype=np.float32))  # every head of every layer may be cached


def attentions(depth: int) -> tuple[str, ...]:
    return tuple(f"blocks.{i}.attn" for i in range(depth))


def head_plan(windows: Any, layers: Sequence[str] | None = None, order: str = "raster") -> HeadPlan:
    """`windows` (N, A, H), or (S, N, A, H) for several streams."""
    array = np.asarray(windows, dtype=np.float32)
    array = array if array.ndim == 4 else array[None]
    return HeadPlan(tuple(layers or attentions(array.shape[2])), array, order)


def plan_for(heads: HeadPlan, compute: Any = None, level: str = "block", **known: Any) -> Plan:
    """Returns a plan for the steps at 1000, 900, …; `compute` (N, R) is its schedule, if it has one."""
    streams, count = (tuple(map(str, range(heads.windows.shape[0]))), heads.windows.shape[1])
    timesteps = tuple(1000.0 - 100 * i for i in range(count))
    if compute is None:
        return Plan.without_schedule("", timesteps, streams, attention=heads, **known)
    rows = np.stack([np.asarray(compute, dtype=np.bool_)] * len(streams))
    regions = ("output",) if level == "output" else tuple(f"blocks.{i}" for i in range(rows.shape[2]))
    weights = np.ones((*rows.shape, 1), dtype=np.float32)
    return Plan("", level, regions, timesteps, rows, weights, streams, attention=heads, **known)


def full_plan(num_steps: int, depth: int, num_heads: int = 4, **changes: Any) -> Plan:
    return plan_for(head_plan(np.full((num_steps, depth, num_heads), FULL), **changes))


class DenseHeads:
    """`tiny_dit` in float64, whose heads do what a table says: dense_heads(x, timestep) → prediction.

    Args:
        model: The original.
        windows: (N, A, H).
        compute: (N, A), whether a block is computed or its last residual repeated; None computes all.
        order: Permutation of the tokens, in whose order windows are wide; None for that of the model.
    """

    def __init__(self, model: TinyDiT, windows: Any, compute: Any = None, order: Any = None) -> None:
        self.model = copy.deepcopy(model).double()
        self.windows: NDArray[np.float32] = np.asarray(windows, dtype=np.float32)
        self.compute, self.order = compute, order
        self.step, self.residuals, self.heads = -1, dict[int, Tensor](), dict[tuple[int, int], Tensor]()
        for i, block in enumerate(self.model.blocks):
            block.attn.forward = lambda x, i=i, attn=block.attn: self._attend(i, attn, x)
            block.forward = lambda x, temb, i=i, run=block.forward: self._run(i, run, x, temb)

    def __call__(self, x: Tensor, timestep: Any) -> Tensor:
        self.step += 1
        times = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), float(timestep))
        with torch.no_grad():
            return self.model(x.double(), times.double())

    def _run(self, i: int, run: Any, x: Tensor, temb: Tensor) -> Tensor:
        if i not in self.residuals or self.compute is None or self.compute[self.step][i]:
            self.residuals[i] = run(x, temb) - x
        return x + self.residuals[i]

    def _attend(self, layer: int, attn: nn.Module, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        place = np.argsort(self.order) if self.order is not None else np.arange(tokens)
        for h, share in enumerate(self.windows[self.step, layer].tolist()):
            if share == CACHED and (layer, h) in self.heads:
                continue
            scores = q[:, h] @ k[:, h].transpose(1, 2) / q.shape[-1] ** 0.5
            if share > 0:
                far = np.abs(place[:, None] - place[None]) > max(1, int(tokens * share / 2))
                scores = scores.masked_fill(torch.from_numpy(far), float("-inf"))
            self.heads[layer, h] = scores.softmax(-1) @ v[:, h]
        mixed = torch.stack([self.heads[layer, h] for h in range(attn.num_heads)], dim=2)
        return attn.out(mixed.reshape(batch, tokens, width))


def run_steps(model: Any, num_steps: int, seed: int = 0) -> list[Tensor]:
    """Calls a model at 1000, 900, … with inputs that do not depend on it."""
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [model(x * (1 - 0.1 * i), torch.full((2,), 1000.0 - 100 * i)) for i in range(num_steps)]
