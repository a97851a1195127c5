"""Weights as the kernels want them: made once for every version of the model's own, never stale."""

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_VERSION = operator.attrgetter("_version")
SAMPLES = 64  # elements of each weight that are compared at every call


class PreparedWeights:
    """What `PrepareWeights` moved out of a graph, and its results for the weights as they are now.

    A changed weight is noticed by its storage, by its version, and by a sample of its elements: `weight.data += delta`,
    as adapters are merged, changes neither storage nor version. Single elements written through `.data` may go unseen:
    `qc_compiler.reset(model)` prepares everything anew.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._version: Any = None
        self._samples: list[tuple[list[Tensor], Tensor]] = []  # views of some bytes, and what they held
        self._values: list[Tensor] = []
        self.count = 0  # how often the weights were prepared

    def __call__(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns what is made of these weights."""
        version = version_of(weights)
        with self._lock:
            if version == self._version and all(torch.equal(torch.cat(now), then) for now, then in self._samples):
                return self._values
            self._version, self._samples = version, _samples(weights)
            with torch.no_grad():
                self._values = list(self._graph(*weights))
            self.count += 1
            return self._values

    def clear(self) -> None:
        """Frees the prepared weights and what it remembers of the model's own."""
        with self._lock:
            self._version, self._samples, self._values = None, [], []

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values)


class PreparedGraph:
    """A compiled graph that is given its prepared weights behind the model's own inputs and what steers
    its linears and its attention.

    Args:
        compiled: The graph's function.
        weights: Shared with the graphs of other shapes, whose inputs stand elsewhere.
        sources: Which inputs of this graph are the weights.
        at: How many of its arguments come before the prepared weights.
    """

    def __init__(self, compiled: Callable[..., Any], weights: PreparedWeights, sources: Sequence[int], at: int) -> None:
        self._compiled, self.weights, self._sources, self._at = compiled, weights, tuple(sources), at

    def __call__(self, *args: Any) -> Any:
        prepared = self.weights([args[i] for i in self._sources])
        return self._compiled(*args[: self._at], *prepared, *args[self._at :])


def version_of(tensors: Sequence[Tensor]) -> int:
    """Returns a number that changes when one of the tensors is replaced or written to."""
    try:
        versions = tuple(map(_VERSION, tensors))
    except RuntimeError:  # inference tensors have none
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
    return hash((tuple(map(Tensor.data_ptr, tensors)), versions))


def _samples(weights: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """Returns views of the bytes of some elements, spread over each whole weight, and what they hold now."""
    views: dict[int, list[Tensor]] = {}
    for weight in weights:
        count = min(SAMPLES, weight.numel())
        spread = weight.detach().as_strided((count, 1), (weight.numel() // count, 1))
        views.setdefault(weight.element_size(), []).append(spread.view(torch.uint8))
    return [(group, torch.cat(group)) for group in views.values()]
