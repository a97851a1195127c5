"""What each block is worth: how far a prediction moves where one block is left out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import GuardedGraph
from ..trajectory import Position, StreamState
from .recording import Recording, flat


class OneBlockLess:
    """Leaves one block out of each call, another each time, and keeps the trajectory on its recorded path."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self._name = recording, ""
        self._errors: dict[str, list[float]] = {}

    def decide(
        self, graph: GuardedGraph, position: Position, state: StreamState, *_: Any
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], None]:
        names = [name for name, can in zip(graph.names, graph._prunable) if can and name not in ("output", "probe")]
        compute = np.ones(len(graph.names), dtype=np.bool_)
        turn = list(self.recording.outputs).index(position.stream) * self.recording.num_steps + position.step
        self._name = names[turn % len(names)] if names else ""  # in each stream one after the other
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
