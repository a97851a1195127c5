"""Pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .trajectory_summary import Summary


def draw_map(summary: "Summary", path: str | Path) -> None:
    """Draws the step × region map of a trajectory, one panel a stream: dark computed, light reused, orange pruned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [region.name for region in summary.regions]
    height = max(1.3, 0.2 * len(names) + 0.9)
    figure = Figure(figsize=(10, height * len(summary.streams)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(summary.streams), 1, squeeze=False)[:, 0]
    for panel, stream in zip(panels, summary.streams):
        panel.imshow(
            (stream.computed + 2 * stream.pruned).T,
            aspect="auto",
            cmap=ListedColormap(["#dfe6ee", "#1f4e79", "#e08a3c"]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.set_xticks(np.arange(-0.5, len(stream.computed)), minor=True)
        panel.set_yticks(np.arange(-0.5, len(names)), minor=True)
        panel.grid(which="minor", color="white", linewidth=0.6)
        panel.tick_params(which="minor", length=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("step")
        panel.set_title(
            f"stream {stream.name}: dark = computed, light = reused, orange = pruned "
            f"(share of all streams {summary.computed_share:.2f})",
            fontsize=9,
            loc="left",
        )
    figure.savefig(path, dpi=150)
