"""Drives the runtime over a rewritten graph that is built once: a call of the model takes a millisecond."""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from capture import Captured, capture
from qc_compiler.backend import _guarded_graph
from qc_compiler.options import parse_options
from qc_compiler.runtime import Runtime
from tiny_models import tiny_dit

SHAPE = (2, 16, 8)


@functools.cache
def _captured(depth: int) -> Captured:
    return capture(tiny_dit(depth), torch.zeros(SHAPE), torch.ones(SHAPE[0]))


@functools.cache
def _rewritten(depth: int, **options: Any) -> fx.GraphModule:
    return _captured(depth).rewritten(**options)


class Driver:
    """`tiny_dit` under the guarded runtime, without Dynamo around it: driver(x, timestep) → prediction.

    Attributes:
        decisions: What the graph was called with, a row a call; None where it was not called.
        weights: Likewise.
        modes: What attention was called with, where it is head-wise.
    """

    def __init__(self, depth: int = 3, **options: Any) -> None:
        parsed = parse_options(options)
        self.runtime = Runtime(parsed)
        if parsed.plan is not None:
            self.gm = _captured(depth).rewritten(**options)
        else:
            self.gm = _rewritten(
                depth,
                **{"cache": parsed.cache, "level": parsed.level, "cache_order": parsed.depth - 1}
                | {"cache_dtype": parsed.cache_dtype},
            )
        captured = _captured(depth)
        self.graph = _guarded_graph(self.gm, len(captured.inputs), self.runtime)
        self.graph.compiled = self._compiled
        self.inputs = [
            nn.Parameter(value.detach().clone(), requires_grad=False) if i in self.graph.parameters else value
            for i, value in enumerate(captured.inputs)
        ]
        self.decisions: list[NDArray[np.bool_] | None] = []
        self.weights: list[NDArray[np.float32] | None] = []
        self.modes: list[NDArray[np.int32]] = []

    def _compiled(self, *args: Any) -> Any:
        at, layers = len(self.inputs), self.graph.interface.layers
        if layers:
            self.modes.append(args[at].numpy().copy())
            at += 2 + sum(layer.num_kept > 0 for layer in layers)
        self.decisions[-1], self.weights[-1] = args[at].numpy().copy(), args[at + 1].numpy().copy()
        return self.gm(*args)

    def __call__(self, x: Tensor, timestep: Any) -> Tensor:
        inputs = list(self.inputs)
        assert self.graph.latent is not None
        assert self.graph.clock is not None
        inputs[self.graph.latent] = x
        inputs[self.graph.clock] = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), float(timestep))
        self.decisions.append(None)
        self.weights.append(None)
        with torch.no_grad():
            (result,) = self.graph(*inputs)
        return result

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.inputs[i] for i in self.graph.parameters]

    def computed(self) -> list[bool | None]:
        """Returns for each call whether all regions were computed; None where only some were."""
        rows = [np.zeros(1, dtype=np.bool_) if row is None else row for row in self.decisions]
        return [True if row.all() else (None if row.any() else False) for row in rows]

    def slots(self) -> list[Tensor]:
        """Returns every slot of every stream of every trajectory that is still remembered."""
        states = [state for trajectory in self.runtime.trajectories for state in trajectory.streams]
        return [t for state in states for history in state.history for _, tensors in history for t in tensors]

    def kept(self, turn: int = 0) -> list[Tensor | None]:
        """Returns the kept heads of each layer of a stream of the last trajectory."""
        return self.runtime.trajectories[-1].streams[turn].kept


def noise(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))
