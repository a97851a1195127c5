"""What each block is worth: how far a prediction moves where one block is left out."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import GuardedGraph, Pilot
from ..trajectory import Position, StreamState
from .recording import Recording, flat


class OneBlockLess(Pilot):
    """Leaves one block out of each call, and keeps the trajectory on its recorded path.

    It is the block that was left out least so far, and of several the one least in the call's stream.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording, self._name = recording, ""
        self._names: list[str] = []
        self._times: dict[str, Counter[str]] = defaultdict(Counter)  # left out, of each stream
        self._errors: dict[str, list[float]] = {}

    @property
    def is_done(self) -> bool:
        """Whether every block was left out: more blocks than calls take several runs."""
        return set(self._names) <= self._errors.keys()

    def decide(
        self, graph: GuardedGraph, position: Position, state: StreamState, *_: Any
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], None]:
        here, total = self._times[position.stream], sum(self._times.values(), Counter())
        prunable = zip(graph.names, graph._prunable)
        self._names = [name for name, can in prunable if can and name not in ("output", "probe")]
        self._name = min(self._names, key=lambda name: (total[name], here[name]), default="")
        here[self._name] += 1
        compute = np.ones(len(graph.names), dtype=np.bool_)
        if self._name:
            compute[graph.names.index(self._name)] = False
        return compute, np.zeros((len(graph.names), graph.interface.depth), dtype=np.float32), None

    def observe(self, graph: GuardedGraph, position: Position, timestep: Any, inputs: Any, results: Any) -> Any:
        wanted = self.recording.outputs[position.stream][position.step]
        error = float((flat(results[0]) - wanted).norm() / wanted.norm())
        self._errors.setdefault(self._name, []).append(error)
        return (wanted.view_as(results[0]).to(results[0]), *results[1:])

    def harms(self) -> dict[str, float]:
        """Returns the mean error of a prediction without each block."""
        return {name: float(np.mean(errors)) for name, errors in self._errors.items() if name}
