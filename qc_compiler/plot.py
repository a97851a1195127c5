"""Pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .trajectory_summary import StreamSummary, Summary

COLORS = ("#dfe6ee", "#1f4e79", "#e08a3c", "#7aa974", "#a05195", "#665191")


@dataclass(frozen=True)
class Map:
    """Values (N, rows) of N steps: numbers of the labels, or parts in [0, 1] where there are none."""

    title: str
    values: NDArray[Any]
    names: Sequence[str]
    labels: tuple[str, ...] = ()


def draw_map(summary: "Summary", path: str | Path) -> None:
    """Draws the maps of a trajectory into a PNG, stream by stream: steps to the right, downwards

    - the regions: computed, reused or pruned;
    - the attentions, if they are head-wise: the part of their query–key pairs that was computed;
    - the linears, if their precision changes from step to step: its scheme;

    and above them what holds at every step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = [each for stream in summary.streams for each in _maps(summary, stream)]
    heights = [max(1.3, 0.2 * len(each.names) + 0.9) for each in maps]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, each in zip(panels, maps):
        _draw(panel, each)
    if summary.always:
        figure.suptitle(f"at every step: {'; '.join(summary.always)}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _maps(summary: "Summary", stream: "StreamSummary") -> list[Map]:
    title = f"stream {stream.name}: regions (computed share of all streams {summary.computed_share:.2f})"
    names = [region.name for region in summary.regions]
    maps = [Map(title, stream.computed + 2 * stream.pruned, names, ("reused", "computed", "pruned"))]
    if stream.attended is not None:
        title = f"stream {stream.name}: part of the query–key pairs that was computed (grey: not run)"
        maps.append(Map(title, stream.attended, summary.layers))
    if stream.precision is not None:
        title = f"stream {stream.name}: precision of the linears, weight/activation"
        maps.append(Map(title, stream.precision + 1, summary.sites, ("reused", *summary.schemes)))
    return maps


def _draw(panel: Any, each: Map) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    palette, top, keys = colormaps["Blues"].with_extremes(bad="#bbbbbb"), 1, {"all": 1.0, "half": 0.5, "none": 0.0}
    if each.labels:
        palette, top = ListedColormap(COLORS[: len(each.labels)]), len(each.labels) - 1
        keys = {label: i / top for i, label in enumerate(each.labels)}
    panel.imshow(each.values.T, aspect="auto", cmap=palette, vmin=0, vmax=top, interpolation="nearest")
    handles = [Patch(color=palette(value), label=label) for label, value in keys.items()]
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7, frameon=False)
    panel.set_yticks(range(len(each.names)), each.names, fontsize=7)
    panel.set_xticks(np.arange(-0.5, len(each.values)), minor=True)
    panel.set_yticks(np.arange(-0.5, len(each.names)), minor=True)
    panel.grid(which="minor", color="white", linewidth=0.6)
    panel.tick_params(which="minor", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("step")
    panel.set_title(each.title, fontsize=9, loc="left")
