"""What the last trajectory of a model computed and reused: as data, as a table, as a picture."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from .attention import WINDOW, attended_share
from .costs import hint
from .errors import QuantCacheError
from .graph import AttentionSite, Interface, RegionSpec
from .registry import runtime_of
from .runtime import Runtime
from .statistics import Statistic
from .trajectory import StreamState


@dataclass(frozen=True)
class StreamSummary:
    """One stream of a trajectory.

    Attributes:
        name: The user's name for it, or the number of the call among those with one timestep.
        timesteps: Of its steps; None where the model has no timestep input.
        computed: bool (N, R): which region was computed at which step.
        pruned: bool (N, R): which was left out; the others were reused.
        statistics: float32 (N, R, len(Statistic)), zero where a region was not computed.
        slot_bytes: What its slots hold now.
        num_bounded: How many of its changes lay below the noise floor of the quantization, and count as that.
        precision: int (N, S): which scheme each site took at a step, -1 where it was reused; None without a choice.
        attended: float64 (N, A): part of the query–key pairs that each layer's attention computed, NaN where the graph
            did not run; None where attention is not head-wise.
    """

    name: str
    timesteps: tuple[float | None, ...]
    computed: NDArray[np.bool_]
    pruned: NDArray[np.bool_]
    statistics: NDArray[np.float32]
    slot_bytes: int
    num_bounded: int = 0
    precision: NDArray[np.int_] | None = None
    attended: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Summary:
    """The last trajectory of a compiled model; prints as a table.

    Attributes:
        regions: The rows of the map.
        streams: Of the last trajectory.
        peak_slot_bytes: The most that the slots of one stream can hold.
        overhead_ms: Median time a step spends on the host, outside the compiled graph.
        notes: Why graphs of this model run as plain Inductor, if any do.
        schemes: What the numbers in `precision` stand for, as weight/activation.
        kept_bytes: What the attention heads that later steps reuse take, of one stream.
        sites, layers: Names of the linears of `precision` and of the attentions of `attended`.
        always: What holds at every step: how the linears are quantized, which regions have left the graph.
    """

    regions: tuple[RegionSpec, ...]
    streams: tuple[StreamSummary, ...]
    peak_slot_bytes: int
    overhead_ms: float
    notes: tuple[str, ...]
    schemes: tuple[str, ...] = ()
    kept_bytes: int = 0
    sites: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    always: tuple[str, ...] = ()

    @property
    def precision_shares(self) -> dict[str, float]:
        """For each scheme the part of all choices that fell on it; empty without a choice."""
        chosen = [stream.precision[stream.precision >= 0] for stream in self.streams if stream.precision is not None]
        if not chosen:
            return {}
        taken = np.concatenate(chosen)
        return {scheme: float((taken == i).mean()) for i, scheme in enumerate(self.schemes)}

    @property
    def attended_share(self) -> float:
        """Part of the query–key pairs of attention that was computed, over the steps whose graph ran; 1 if unknown."""
        known = [stream.attended for stream in self.streams if stream.attended is not None]
        return float(np.nanmean(np.concatenate(known))) if known else 1.0

    @property
    def computed_share(self) -> float:
        """Part of the block computations that was run, weighted by their floating point operations."""
        return computed_share(self.regions, [stream.computed for stream in self.streams])

    @property
    def pruned_share(self) -> float:
        """Part of the block computations that was left out, weighted likewise."""
        return computed_share(self.regions, [stream.pruned for stream in self.streams])

    def plot(self, path: str | Path) -> None:
        """Draws what was computed, attended and quantized how, step by step and for every stream, into a PNG."""
        from .plot import draw_map

        draw_map(self, path)

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            for stream in self.streams:
                console.print(self._table(stream))
            streams = f"{len(self.streams)} stream" + ("s" if len(self.streams) != 1 else "")
            console.print(
                f"computed share {self.computed_share:.3f} over {streams} · slots at most "
                f"{_bytes(self.peak_slot_bytes)} a stream · host {self.overhead_ms:.2f} ms a step",
                highlight=False,
            )
            if self.pruned_share:
                console.print(f"pruned share {self.pruned_share:.3f}", highlight=False)
            if num_bounded := sum(stream.num_bounded for stream in self.streams):
                changes = f"{num_bounded} change" + ("s" if num_bounded != 1 else "")
                console.print(f"{changes} lay below the noise floor", highlight=False)
            if shares := self.precision_shares:
                parts = ", ".join(f"{scheme} {share:.0%}".replace("%", " %") for scheme, share in shares.items())
                console.print(f"precision: {parts}", highlight=False)
            if any(stream.attended is not None for stream in self.streams):
                pairs, kept = f"{self.attended_share:.0%}".replace("%", " %"), _bytes(self.kept_bytes)
                console.print(f"attention: {pairs} of query–key pairs · kept heads {kept} a stream", highlight=False)
            for decision in self.always:
                console.print(f"at every step: {decision}", highlight=False)
            for note in self.notes:
                console.print(f"plain Inductor: {note}", highlight=False)
        return capture.get()

    def _table(self, stream: StreamSummary) -> Table:
        table = Table(title=f"stream {stream.name}: {len(stream.computed)} steps", title_justify="left")
        for heading in ("region", "computed", "Γ", "change", "cosine", "motion"):
            table.add_column(heading, justify="left" if heading == "region" else "right")
        table.add_column("steps (█ computed, · reused" + (", × pruned)" if stream.pruned.any() else ")"))
        for r, region in enumerate(self.regions):
            ran = stream.computed[:, r]
            rows = stream.statistics[ran, r]
            later = rows[1:] if len(rows) > 1 else rows  # the first has nothing to compare with
            columns = (Statistic.GAMMA, Statistic.CHANGE, Statistic.COSINE, Statistic.MOTION)
            means = [f"{later[:, c].mean():.3f}" if len(rows) > 1 else "–" for c in columns]
            marks = "".join("█" if run else "·×"[int(out)] for run, out in zip(ran, stream.pruned[:, r]))
            table.add_row(region.name, f"{ran.sum()}/{len(ran)}", *means, marks)
        return table


def computed_share(regions: Sequence[RegionSpec], computed: Sequence[NDArray[np.bool_]]) -> float:
    """Returns Σ FLOPs of computed regions / Σ FLOPs of all; a step that skips the output computes nothing.

    Where only the output is guarded, a computed step counts as one.
    """
    flops = np.array([region.flops for region in regions])
    if not flops.any():
        flops = np.ones(len(regions))
    total = sum(len(steps) for steps in computed) * flops.sum()
    return float(sum((steps @ flops).sum() for steps in computed) / total) if total else 0.0


def summarize(model: Any) -> Summary:
    """
    Raises:
        QuantCacheError: the model has not run under quantcache yet, or nothing of it is guarded.
    """
    runtime = runtime_of(model)
    interface = runtime.interface
    if interface is None:
        why = "it has not run yet" if runtime.options.caches else "its options guard nothing (cache='off')"
        raise QuantCacheError("nothing is cached for this model: " + ("; ".join(runtime.notes) or why))
    trajectories = runtime.last_trajectories()
    streams = [
        _stream_summary(trajectory.name or str(turn), state, interface)
        for trajectory in trajectories
        for turn, state in enumerate(trajectory.streams)
    ]
    overhead = float(np.median(runtime.host_ms)) if runtime.host_ms else 0.0
    return Summary(
        tuple(interface.regions),
        tuple(streams),
        runtime.peak_slot_bytes,
        overhead,
        tuple(runtime.notes),
        tuple(f"{scheme.weight}/{scheme.activation}" for scheme in runtime.options.schemes),
        sum(math.prod(map(hint, layer.shape)) * layer.dtype.itemsize for layer in interface.layers),
        tuple(site.name for site in interface.sites),
        tuple(layer.name for layer in interface.layers),
        tuple(_always(runtime)),
    )


def _always(runtime: Runtime) -> Iterator[str]:
    options = runtime.options
    if runtime.quantizes and not options.chooses_precision:
        yield f"linears {options.quantize}"
    if options.pruned:
        yield f"without {', '.join(options.pruned)}"


def _stream_summary(name: str, state: StreamState, interface: Interface) -> StreamSummary:
    kept = [t for t in state.kept if t is not None]
    return StreamSummary(
        name,
        tuple(step.timestep for step in state.steps),
        np.array([step.computed for step in state.steps]),
        np.array([np.zeros_like(step.computed) if step.pruned is None else step.pruned for step in state.steps]),
        np.array([step.resolve().statistics for step in state.steps]),
        sum(t.nbytes for t in (*kept, *(t for slots in state.history for _, tensors in slots for t in tensors))),
        sum(step.num_bounded for step in state.steps),  # known once their statistics were read, above
        _precision(state, len(interface.sites)),
        _attended(state, interface.layers),
    )


def _attended(state: StreamState, layers: Sequence[AttentionSite]) -> NDArray[np.float64] | None:
    if not layers:
        return None
    shares = np.full((len(state.steps), len(layers)), np.nan)
    for row, step in zip(shares, state.steps):
        for i, layer in enumerate(layers if step.modes is not None else ()):
            windows = step.modes[i, WINDOW, : layer.num_heads].tolist()  # type: ignore[index]
            tokens = int(hint(layer.shape[2]))
            row[i] = np.mean([attended_share(window, tokens, layer.num_text) for window in windows])
    return shares


def _precision(state: StreamState, num_sites: int) -> NDArray[np.int_] | None:
    if not num_sites:
        return None
    reused = np.full(num_sites, -1)
    return np.array([reused if step.precision is None else step.precision for step in state.steps])


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"
