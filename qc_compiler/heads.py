"""From a plan to `modes`: what each attention head does in one call of the graph."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .attention import CACHED, FULL, ROW, WINDOW
from .errors import OptionError
from .graph import AttentionSite
from .plan import HeadPlan

ASK = -100
"""`ASK - i` for the heads of layer i: what they do is decided inside the graph, by calibration."""


class Heads:
    """What a plan says of the layers of one graph.

    Attributes:
        rows: int32 (A, H): where in its layer's slot a head is kept, -1 where it is not.

    Raises:
        PlanError: the plan says nothing about a layer, or knows it with another number of heads.
        OptionError: a layer's slot is too small for the heads that the plan takes from it.
    """

    def __init__(self, plan: HeadPlan, layers: Sequence[AttentionSite]) -> None:
        self._plan, self._layers = plan, layers
        self._width = max(layer.num_heads for layer in layers)
        self._at = [plan.index(layer.name) for layer in layers] if plan.layers else []
        self.rows = np.full((len(layers), self._width), -1, dtype=np.int32)
        for row, layer in zip(self.rows, layers):
            kept = plan.kept(layer.name, layer.num_heads) if plan.layers else range(layer.num_heads)
            if len(kept) > layer.num_kept:
                raise OptionError(
                    f"plan=… caches {len(kept)} heads of {layer.name} and needs a new torch.compile: this graph keeps "
                    f"{layer.num_kept}"
                )
            others = (head for head in range(layer.num_heads) if head not in kept)
            row[[*kept, *others][: layer.num_kept]] = np.arange(layer.num_kept)

    def modes(
        self, stream: int, step: int, filled: Sequence[bool], num_tokens: Sequence[int], asks: bool = False
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Returns `modes` int32 (A, 2, H), and whether a layer attends at all, bool (A,).

        Args:
            stream, step: Of the plan.
            filled: Whether a layer's slot holds anything; heads that would be cached are full where it does not.
            num_tokens: Of each layer, text included.
            asks: In a plan that is still to be filled, whether calibration decides; else all heads are full.
        """
        windows = np.full((len(self._layers), self._width), FULL, dtype=np.int32)
        for i, layer in enumerate(self._layers):
            if not self._plan.layers:
                windows[i] = ASK - i if asks else FULL
                continue
            vision = num_tokens[i] - abs(layer.num_text)
            planned = self._plan.windows[stream, step, self._at[i], : layer.num_heads]
            windows[i, : layer.num_heads] = [half_width(share, vision, filled[i]) for share in planned.tolist()]
        present = np.arange(self._width) < np.array([[layer.num_heads] for layer in self._layers])
        modes = np.empty((len(self._layers), 2, self._width), dtype=np.int32)
        modes[:, WINDOW], modes[:, ROW] = windows, self.rows
        return modes, ((windows != CACHED) & present).any(axis=1)


def half_width(share: float, num_vision: int, is_filled: bool = True) -> int:
    """Returns what stands in `modes` for a part of the vision tokens, or for a code, which stays.

    >>> half_width(1 / 8, 4096), half_width(1.999, 16), half_width(0.0, 16), half_width(0.0, 16, is_filled=False)
    (256, -1, 0, -1)
    """
    if share == CACHED:
        return CACHED if is_filled else FULL
    if share < 0:
        return int(share)
    width = max(1, int(num_vision * share / 2))
    return width if width < num_vision - 1 else FULL
