"""Calibration samples: calls of the model on a trajectory, and batches put together from single samples of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantCacheError
from ..runtime import GuardedGraph, Pilot
from ..trajectory import Position
from .selection import select

FEATURES = 1024  # elements of a sample that selection compares


@dataclass(frozen=True)
class Call:
    """One computed call of the model.

    Attributes:
        stream: Name of its stream.
        step: Number of its step.
        inputs: Of the graph, parameters included.
    """

    stream: str
    step: int
    inputs: tuple[Any, ...]


@dataclass
class Calls(Pilot):
    """Looks over the runtime's shoulder and keeps the inputs of every call that was computed."""

    calls: list[Call] = field(default_factory=list)
    latent: int = 0
    parameters: frozenset[int] = frozenset()

    def observe(self, graph: GuardedGraph, position: Position, timestep: Any, inputs: Any, results: Any) -> Any:
        assert graph.latent is not None
        self.latent, self.parameters = graph.latent, frozenset(graph.parameters)
        streams = position.trajectory.streams
        if streams[min(position.turn, len(streams) - 1)].steps[-1].computed.any():
            self.calls.append(Call(position.stream, position.step, tuple(map(self._kept, range(len(inputs)), inputs))))
        return results

    def _kept(self, index: int, value: Any) -> Any:
        """Returns a copy of an input, the last call's where nothing changed: prompts do not."""
        if not isinstance(value, Tensor) or index in self.parameters:
            return value
        last = self.calls[-1].inputs[index] if self.calls else None
        same = last is not None and last.shape == value.shape and torch.equal(last, value)
        return last if same else value.detach().clone()

    @property
    def batch(self) -> int:
        return int(self.calls[0].inputs[self.latent].shape[0])

    def pairs(self, method: str, count: int, seed: int = 0) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Chooses samples and returns batches of them: inputs of the graph, and those at each sample's next step.

        Args:
            method: See `qc_compiler.calibration.selection`.
            count: How many samples, rounded up to whole batches.
            seed: Of the selection.

        Raises:
            QuantCacheError: no stream was computed at two steps.
        """
        following = self._following()
        known = [(c, b) for c in following for b in range(self.batch)]
        if not known:
            raise QuantCacheError("generate(model) computed fewer than two steps: nothing can be compared")
        samples = torch.stack([self._features(c, b) for c, b in known])
        steps = np.array([self.calls[c].step for c, _ in known])
        count = min(-(-count // self.batch) * self.batch, len(known))
        chosen = [known[i] for i in select(method, samples, steps, count, seed)]
        mixed = self._mixed()
        fixed = {c: self._fixed((c, following[c]), mixed) for c in dict.fromkeys(c for c, _ in chosen)}
        return [
            (self._batch(part, mixed), self._batch([(following[c], b) for c, b in part], mixed))
            for part in self._parts(chosen, fixed)
        ]

    def _following(self) -> dict[int, int]:
        """Returns for each call the one at the next computed step of its stream."""
        found: dict[int, int] = {}
        last: dict[str, int] = {}
        for c, call in enumerate(self.calls):
            if call.stream in last and self.calls[last[call.stream]].step < call.step:  # not of another trajectory
                found[last[call.stream]] = c
            last[call.stream] = c
        return found

    def _features(self, call: int, sample: int) -> Tensor:
        flat = self.calls[call].inputs[self.latent][sample].reshape(-1).float().cpu()
        return flat[:: max(1, flat.numel() // FEATURES)]

    def _parts(self, chosen: Sequence[tuple[int, int]], fixed: Mapping[int, Any]) -> list[list[tuple[int, int]]]:
        """Splits samples into batches; those whose calls differ in what has no batch cannot be mixed."""
        groups: dict[Any, list[tuple[int, int]]] = {}
        for c, b in chosen:
            groups.setdefault(fixed[c], []).append((c, b))
        size = self.batch
        return [
            list(np.resize(np.array(group[at : at + size]), (size, 2)))
            for group in groups.values()
            for at in range(0, len(group), size)
        ]

    def _mixed(self) -> frozenset[int]:
        """Returns the inputs that have the batch as their first axis, in every call."""

        def mixes(value: Any) -> bool:
            return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch

        indices = set(range(len(self.calls[0].inputs))) - self.parameters
        return frozenset(i for i in indices if all(mixes(call.inputs[i]) for call in self.calls))

    def _fixed(self, calls: Sequence[int], mixed: frozenset[int]) -> Any:
        """Returns what is the same for all samples of these calls."""
        kept = self.parameters | mixed
        return tuple(_key(x) for c in calls for i, x in enumerate(self.calls[c].inputs) if i not in kept)

    def _batch(self, part: Sequence[tuple[int, int]], mixed: frozenset[int]) -> tuple[Any, ...]:
        first = self.calls[part[0][0]].inputs
        return tuple(
            torch.stack([self.calls[c].inputs[i][b] for c, b in part]) if i in mixed else x for i, x in enumerate(first)
        )


def _key(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), tuple(np.asarray(value.detach().reshape(-1)[:256].float().cpu()).tolist())
