"""Plan: what is computed where and when, found by calibration; one safetensors file with JSON in its header."""

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .attention import CACHED, FULL, INT8
from .checksum import checksum
from .errors import PlanError
from .extrapolation import moved_weights

VERSION = 4


class _Quantization(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    recipe: str
    sites: list[str]
    threshold: float
    regions: list[str]
    widths: list[int]


class _Attention(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    layers: list[str]
    order: str


class _Version(BaseModel):
    """What is read of a header first: another version has other fields."""

    model_config = ConfigDict(strict=True)

    version: int


class _Header(BaseModel):
    """The JSON part of a plan file, validated because files come from outside."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    fingerprint: str
    level: str
    regions: list[str]
    streams: list[str]
    timesteps: list[float]
    measured: dict[str, float]
    quantization: _Quantization | None
    attention: _Attention | None
    pruned: list[str]
    reasons: list[str]
    checksum: str


_OF_SITES = ("bits", "ratios", "alpha", "beta", "noise")
OUTLIER_RATIO = 25.0  # max|X| / mean|X| above which PDR leaves activations in full precision


@dataclass(frozen=True, eq=False)  # arrays have no one truth value; `Plan.digest` compares
class Quantization:
    """What calibration found out about the linears of a model.

    Attributes:
        recipe: The value of the option `quantize` it was made for.
        sites: Module paths of the linears, S of them.
        bits: int8 (S,): what `importance` gives each weight.
        ratios: float32 (S,): the largest max|X| / mean|X| of a linear's input.
        alpha, beta: float32 (S,): DMPQ's prediction of the error in the lowest precision, α·Γ + β.
        threshold: Of the predicted error, for the mean bits that were asked for.
        amax: For each site float32 (K,), the largest magnitude of each input channel; empty if not needed.
        noise: float32 (choices, regions): relL1 that quantization adds to a residual's change from step to step.
        regions: Names of those regions.
    """

    recipe: str
    sites: tuple[str, ...]
    bits: NDArray[np.int8]
    ratios: NDArray[np.float32]
    alpha: NDArray[np.float32]
    beta: NDArray[np.float32]
    threshold: float = 0.5
    amax: tuple[NDArray[np.float32], ...] = ()
    noise: NDArray[np.float32] = field(default_factory=lambda: np.zeros((1, 0), dtype=np.float32))
    regions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("bits", "ratios", "alpha", "beta"):
            if getattr(self, name).shape != (len(self.sites),):
                raise PlanError(f"a plan for {len(self.sites)} linears needs as many {name}: calibrate again")
        if len(self.amax) not in (0, len(self.sites)) or self.noise.shape[1:] != (len(self.regions),):
            raise PlanError("the plan's ranges or noise do not belong to its linears and regions: calibrate again")

    @classmethod
    def of(cls, recipe: str, sites: Sequence[str]) -> "Quantization":
        """Returns what is known of these linears where nothing was measured."""
        zeros = np.zeros(len(sites), dtype=np.float32)
        return cls(recipe, tuple(sites), zeros.astype(np.int8), zeros, zeros + 1, zeros)

    @property
    def has_outliers(self) -> NDArray[np.bool_]:
        """bool (S,)"""
        return self.ratios > OUTLIER_RATIO

    def index(self, site: str) -> int:
        """Returns the number of a linear.

        Raises:
            PlanError: nothing was measured for it.
        """
        if site not in self.sites:
            raise PlanError(f"the plan says nothing about the linear {site!r}: calibrate this model as it is compiled")
        return self.sites.index(site)

    def region_of(self, name: str) -> int | None:
        """Returns the column of `noise` for a region: its own, or that of the block it lies in; None if unknown."""
        block = name.partition("/")[0]
        return next((self.regions.index(r) for r in (name, block) if r in self.regions), None)


TOKEN_ORDERS = ("raster", "time")


@dataclass(frozen=True, eq=False)  # arrays have no one truth value; `Plan.digest` compares
class HeadPlan:
    """What each attention head does at each step.

    Attributes:
        layers: Module paths of the attentions, A of them; none in a plan that calibration is still to fill.
        windows: float32 (S, N, A, H) for S streams and N steps: the width of an arrow as a part of the vision tokens,
            in (0, 2), or one of the codes of `qc_compiler.attention`. Heads that a layer does not have are full.
        order: How the vision tokens stand in a row: `raster`, as the model has them, or `time`, the frames of each
            place side by side.
    """

    layers: tuple[str, ...]
    windows: NDArray[np.float32]
    order: str = "raster"

    def __post_init__(self) -> None:
        known = np.isin(self.windows, (FULL, CACHED, INT8)) | ((self.windows > 0) & (self.windows < 2))
        if self.windows.ndim != 4 or self.windows.shape[2] != len(self.layers) or not known.all():
            raise PlanError(
                f"a plan for {len(self.layers)} attentions cannot hold windows {self.windows.shape}, or these are "
                "out of range: calibrate again"
            )
        if self.order not in TOKEN_ORDERS:
            raise PlanError(f"the plan's order of tokens is {self.order!r}, not one of {', '.join(TOKEN_ORDERS)}")

    def kept(self, layer: str, num_heads: int) -> tuple[int, ...]:
        """Returns those of a layer's heads that any step takes from the cache.

        Raises:
            PlanError: nothing was measured for this layer, or it had another number of heads.
        """
        windows = self.windows[:, :, self.index(layer)]
        if windows.shape[2] < num_heads or (windows[..., num_heads:] != FULL).any():
            raise PlanError(f"{layer} has {num_heads} heads, the plan is for another number: calibrate this model")
        return tuple(np.flatnonzero((windows == CACHED).any(axis=(0, 1))).tolist())

    def index(self, layer: str) -> int:
        """
        Raises:
            PlanError: nothing was measured for this layer.
        """
        if layer not in self.layers:
            raise PlanError(f"the plan says nothing about the attention {layer!r}: calibrate this model")
        return self.layers.index(layer)


@dataclass(frozen=True, eq=False)  # arrays have no one truth value; `Plan.digest` compares
class Plan:
    """What was calibrated for one model: a schedule for its steps, what is known of its linears, what its heads do.

    Attributes:
        fingerprint: Of the model: its modules, and shapes and dtypes of what is not packed (biases, norms). Empty in a
            plan that calibration is still to fill: it fits every model.
        level: The level whose regions the plan steers, as in the option `level`.
        regions: Names of the regions, one a column.
        timesteps: What the model is called with at each step, in order; N of them.
        compute: bool (S, N, R): whether a region is computed at a step of each of S streams.
        weights: float32 (S, N, R, depth): what a region that is reused multiplies its last residuals with, newest
            first.
        streams: Names of the streams: the user's, or "0", "1" … for the calls with one timestep, in order.
        across: float32 (S, N, 1 + depth): what an output that is reused adds of the stream called before it: of its
            newest prediction, and of those when this stream was last computed, newest first.
        measured: What calibration measured, e.g. `share` and `error`.
        quantization: What is known of the linears, or None.
        compensation: float32 (S, N, C, 2): shift and gain of each channel of the model's output (VC), or None.
        attention: What each attention head does at each step, or None: then all are full.
        pruned: Names of the blocks and sub-layers that are never computed (`blocks.3`, `blocks.5/mlp`).
        reasons: Why it was decided so, one line each.

    A region that is not computed and whose weights are zero is pruned at this step: what enters it leaves it. A plan
    without regions has no schedule: the option `cache` decides.
    """

    fingerprint: str
    level: str
    regions: tuple[str, ...]
    timesteps: tuple[float, ...]
    compute: NDArray[np.bool_]
    weights: NDArray[np.float32]
    streams: tuple[str, ...] = ("0",)
    measured: dict[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None
    compensation: NDArray[np.float32] | None = None
    attention: HeadPlan | None = None
    across: NDArray[np.float32] | None = None
    pruned: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pruned, tuple) or not all(isinstance(name, str) for name in self.pruned):
            raise PlanError(f"pruned={self.pruned!r}: expected a tuple of names such as 'blocks.3' or 'blocks.5/mlp'")
        shape = (len(self.streams), len(self.timesteps), len(self.regions))
        if self.compute.shape != shape or self.weights.shape[:3] != shape or self.weights.ndim != 4:
            raise PlanError(
                f"a plan of {shape[0]} streams, {shape[1]} steps and {shape[2]} regions needs compute {shape} and "
                f"weights {(*shape, 'depth')}, got {self.compute.shape} and {self.weights.shape}"
            )
        mixed = (*shape[:2], 1 + self.depth)
        if self.across is not None and self.across.shape != mixed:
            raise PlanError(f"a plan of this shape needs across {mixed}, got {self.across.shape}")
        if 0 in self.weights.shape and self.has_schedule:
            raise PlanError(f"a plan needs a stream, a step, a region and a depth, got weights {self.weights.shape}")
        if not np.isfinite(self.weights).all() or (self.across is not None and not np.isfinite(self.across).all()):
            raise PlanError("the plan's weights are not all finite: calibrate again")
        if self.compensation is not None and (
            self.compensation.ndim != 4
            or self.compensation.shape[:2] != (len(self.streams), len(self.timesteps))
            or self.compensation.shape[3] != 2
            or not np.isfinite(self.compensation).all()
        ):
            raise PlanError(
                f"a plan of {len(self.streams)} streams and {len(self.timesteps)} steps cannot hold a compensation "
                f"{self.compensation.shape}: calibrate again"
            )

        heads = self.attention.windows.shape[:2] if self.attention else None
        if self.attention and self.attention.layers and heads != (len(self.streams), len(self.timesteps)):
            raise PlanError(
                f"a plan of {len(self.streams)} streams and {len(self.timesteps)} steps cannot hold heads for {heads}: "
                "calibrate again"
            )

    @classmethod
    def without_schedule(
        cls, fingerprint: str, timesteps: tuple[float, ...] = (), streams: tuple[str, ...] = ("0",), **known: Any
    ) -> "Plan":
        """Returns a plan that leaves it to the option `cache` what is computed; `known` as of the class."""
        compute = np.zeros((len(streams), len(timesteps), 0), dtype=np.bool_)
        weights = np.zeros((len(streams), len(timesteps), 0, 1), dtype=np.float32)
        return cls(fingerprint, "output", (), timesteps, compute, weights, streams, **known)

    def compressed_like(self, other: "Plan") -> "Plan":
        """Returns this schedule for a model with the linears, heads and pruned regions of another plan."""
        return replace(self, quantization=other.quantization, attention=other.attention, pruned=other.pruned)

    @property
    def has_schedule(self) -> bool:
        return bool(self.regions)

    @property
    def depth(self) -> int:
        """How many residuals a slot must remember."""
        return int(self.weights.shape[3])

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @functools.cached_property
    def prunes(self) -> NDArray[np.bool_]:
        """bool (S, N, R): which regions are pruned at a step; none at steps that are skipped as a whole."""
        found = ~self.compute & ~self.weights.any(axis=3)
        if self.regions[:1] == ("output",):
            found[..., 1:] &= self.compute[..., :1]
        return found

    @functools.cached_property
    def removed(self) -> tuple[str, ...]:
        """Names of what is never computed: `pruned`, and the regions that the schedule prunes wherever it can."""
        never = ~self.compute.any(axis=(0, 1)) & ~self.weights.any(axis=(0, 1, 3))
        return tuple(dict.fromkeys([*self.pruned, *(self.regions[r] for r in np.flatnonzero(never))]))

    @functools.cached_property
    def _steps(self) -> dict[float, int]:
        return dict(zip(self.timesteps[::-1], reversed(range(self.num_steps))))  # of equal ones the first

    def step_of(self, timestep: float) -> int:
        """Returns the number of the step that is called with this timestep.

        Raises:
            PlanError: no step of the plan has it: the plan is for another number of steps or another scheduler.
        """
        if (exact := self._steps.get(timestep)) is not None:
            return exact
        known = np.asarray(self.timesteps)
        step = int(np.argmin(np.abs(known - timestep)))
        scale = max(float(np.abs(known).max()), 1e-6)
        if not abs(known[step] - timestep) <= 1e-3 * scale:
            raise PlanError(
                f"the model was called with timestep {timestep:g}, which is none of the plan's {self.num_steps} steps "
                f"({known[0]:g}, {known[min(1, len(known) - 1)]:g} … {known[-1]:g}): calibrate for this schedule, "
                "or use plan.retimed([timesteps])"
            )
        return step

    def retimed(self, timesteps: Sequence[float]) -> "Plan":
        """Returns the plan for other timesteps of the same sampler: another number of steps, or another shift of them.

        What the plan computes at a step is computed at that of the new steps which lies nearest. The weights of a
        skipped step are read between those fitted for old ones (`moved_weights`); heads do as at the nearest old step.
        A compensation is dropped, and so is what was measured: calibrate for better.

        Args:
            timesteps: What the model will be called with, in order, such as `scheduler.timesteps.tolist()`.

        Raises:
            PlanError: the plan has no steps, or the timesteps are not finite numbers that differ.
        """
        times, known = np.asarray(timesteps, dtype=np.float64), np.asarray(self.timesteps)
        if times.ndim != 1 or not times.size or not np.isfinite(times).all() or len(np.unique(times)) < times.size:
            raise PlanError(f"timesteps={timesteps!r}: expected finite numbers, each another")
        if not known.size:
            raise PlanError("the plan has no steps: without a schedule or heads it fits any number of them")
        distance = np.abs(times[:, None] - known)
        nearest_old, nearest_new = distance.argmin(axis=1), distance.argmin(axis=0)
        nearest_old[0] = 0  # where everything is computed
        compute = np.zeros((len(self.streams), times.size, len(self.regions)), dtype=np.bool_)
        compute[:, 0] = self.compute[:, 0]
        for old, new in enumerate(nearest_new):
            compute[:, new] |= self.compute[:, old]
        prunes = self.prunes[:, nearest_old] & ~compute
        weights = np.zeros((*compute.shape, self.depth), dtype=np.float32)
        across = None if self.across is None else np.zeros((len(self.streams), times.size, 1 + self.depth), np.float32)
        for stream, region in np.ndindex(len(self.streams), len(self.regions)):
            at = stream, slice(None), region
            beside = [] if self.across is None or region else [self.across[stream]]
            fitted = np.concatenate([self.weights[at], *beside], axis=1)
            moved = moved_weights(fitted, known, self.compute[at], times, compute[at], self.depth)
            weights[at] = np.where(prunes[at][:, None], 0, moved[:, : self.depth])
            if across is not None and not region:
                across[stream] = moved[:, self.depth :]
        heads = self.attention
        if heads is not None and heads.layers:
            heads = replace(heads, windows=heads.windows[:, nearest_old])
        note = f"re-timed from {self.num_steps} steps to {times.size}: weights are read between those fitted"
        return replace(
            self,
            timesteps=tuple(times.tolist()),
            compute=compute,
            weights=weights,
            across=across,
            compensation=None,
            attention=heads,
            measured={"share": float(compute.mean())} if self.has_schedule else {},
            reasons=(*self.reasons, note),
        )

    def index_of(self, stream: str) -> int:
        """Returns the number of a stream; one that the plan does not know does as the first."""
        return self.streams.index(stream) if stream in self.streams else 0

    def fits(self, level: str, depth: int) -> bool:
        """Whether a graph compiled for this level and depth can be steered by the schedule."""
        is_host_only = self.level == "output" and level.startswith("output")
        return self.depth == depth and (level == self.level or is_host_only)

    def columns(self, regions: Sequence[str]) -> list[int]:
        """Returns the column of each region of a graph; where only the output is scheduled, all follow it."""
        known = {name: column for column, name in enumerate(self.regions)}
        return [0 if self.level == "output" else known[name] for name in regions]

    def check_model(self, fingerprint: str, regions: tuple[str, ...], fixed: Collection[str] = ()) -> None:
        """
        Args:
            fingerprint: Of the model.
            regions: Of its graph.
            fixed: Those of them that cannot be pruned.

        Raises:
            PlanError: the plan was calibrated on another model, or prunes what cannot be pruned.
        """
        known = regions[: len(self.regions)] if self.level == "output" else regions
        fits = set(known) <= set(self.regions) and all(map(self._may_lack, set(self.regions) - set(known)))
        if (self.has_schedule and not fits) or self.fingerprint not in ("", fingerprint):
            raise PlanError(
                f"the plan is for a model with {len(self.regions)} regions and fingerprint {self.fingerprint[:12]}, "
                f"this model has {len(regions)} and {fingerprint[:12]}: calibrate this model"
            )
        for name in [name for name in self.regions if name in fixed]:
            if (steps := np.flatnonzero(self.prunes[..., self.regions.index(name)].any(axis=0))).size:
                raise PlanError(
                    f"the plan prunes {name!r} at step {steps[0]}, but a result of it is no residual of what enters "
                    "it: give it weights, or compute it"
                )

    def _may_lack(self, region: str) -> bool:
        """Whether a graph may have no such region: it was removed, or its block, or parts of it."""
        block = region.partition("/")[0]
        return any(name in (region, block) or name.startswith(f"{region}/") for name in self.removed)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        header, arrays = self._parts()
        save_file(arrays, str(path), metadata={"quantcache_plan": json.dumps(header)})

    @functools.cached_property
    def digest(self) -> str:
        """Equal for plans that say the same."""
        return str(self._parts()[0]["checksum"])

    def _parts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        arrays: dict[str, NDArray[Any]] = {
            "compute": self.compute.astype(np.uint8),
            "weights": self.weights.astype(np.float32),
        }
        header: dict[str, Any] = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "level": self.level,
            "regions": list(self.regions),
            "streams": list(self.streams),
            "timesteps": list(map(float, self.timesteps)),
            "measured": self.measured,
            "quantization": None,
            "attention": None,
            "pruned": list(self.pruned),
            "reasons": list(self.reasons),
        }
        if heads := self.attention:
            header["attention"] = {"layers": list(heads.layers), "order": heads.order}
            arrays["windows"] = heads.windows.astype(np.float32)
        if self.compensation is not None:
            arrays["compensation"] = self.compensation.astype(np.float32)
        if self.across is not None:
            arrays["across"] = self.across.astype(np.float32)
        if known := self.quantization:
            header["quantization"] = {
                "recipe": known.recipe,
                "sites": list(known.sites),
                "threshold": known.threshold,
                "regions": list(known.regions),
                "widths": [len(amax) for amax in known.amax],
            }
            arrays |= {name: getattr(known, name) for name in _OF_SITES}
            arrays["amax"] = np.concatenate([*known.amax, np.zeros(0, dtype=np.float32)])
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}  # safetensors writes the memory
        header["checksum"] = checksum(header, sorted(arrays.items()))
        return header, arrays

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan file; nothing in it is executed.

        Raises:
            PlanError: the file is missing, truncated, changed since it was written, or of another version.
        """
        if not Path(path).is_file():
            raise PlanError(f"no plan at {path}: expected a file written by Plan.save")
        try:
            with safe_open(str(path), framework="numpy") as file:
                text = (file.metadata() or {}).get("quantcache_plan")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise PlanError(f"{path} is damaged or no safetensors file: {error}") from error
        if text is None:
            raise PlanError(f"{path} is a safetensors file without a plan in its header")
        try:
            if (version := _Version.model_validate_json(text).version) != VERSION:
                raise PlanError(f"{path}: plan version {version}, this quantcache reads {VERSION}: calibrate again")
            header = _Header.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"{path}: the plan's header is invalid: {error.errors()[0]['msg']}") from error
        fields = header.model_dump()
        written = fields.pop("checksum")
        needed = {"compute", "weights", *((*_OF_SITES, "amax") if header.quantization else ())}
        needed |= {"windows"} if header.attention else set()
        if not needed <= set(arrays) or written != checksum(fields, sorted(arrays.items())):
            raise PlanError(f"{path} was changed since it was written (checksum differs): calibrate again")
        return cls(
            header.fingerprint,
            header.level,
            tuple(header.regions),
            tuple(header.timesteps),
            arrays["compute"].astype(np.bool_),
            arrays["weights"],
            tuple(header.streams),
            header.measured,
            _quantization(header.quantization, arrays) if header.quantization else None,
            arrays.get("compensation"),
            HeadPlan(tuple(header.attention.layers), arrays["windows"], header.attention.order)
            if header.attention
            else None,
            arrays.get("across"),
            tuple(header.pruned),
            tuple(header.reasons),
        )


def _quantization(header: _Quantization, arrays: Mapping[str, NDArray[Any]]) -> Quantization:
    ends = np.cumsum(header.widths)
    return Quantization(
        header.recipe,
        tuple(header.sites),
        **{name: arrays[name] for name in _OF_SITES},
        threshold=header.threshold,
        amax=tuple(np.split(arrays["amax"], ends[:-1])) if header.widths else (),
        regions=tuple(header.regions),
    )
