"""Plan: what is computed where and when, found by calibration; one safetensors file with JSON in its header."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import PlanError

VERSION = 1


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
    checksum: str


@dataclass(frozen=True)
class Plan:
    """A schedule for one model and one list of timesteps.

    Attributes:
        fingerprint: Of the model: its parameters' shapes and dtypes.
        level: The level whose regions the plan steers, as in the option `level`.
        regions: Names of the regions, one a column.
        timesteps: What the model is called with at each step, in order; N of them.
        compute: bool (N, R): whether a region is computed at a step.
        weights: float32 (S, N, R, depth): what a region that is reused multiplies its last residuals with, newest
            first, in each of S streams.
        streams: Names of the streams: the user's, or "0", "1" … for the calls with one timestep, in order.
        measured: What calibration measured, e.g. `share` and `error`.
    """

    fingerprint: str
    level: str
    regions: tuple[str, ...]
    timesteps: tuple[float, ...]
    compute: NDArray[np.bool_]
    weights: NDArray[np.float32]
    streams: tuple[str, ...] = ("0",)
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.timesteps), len(self.regions))
        wanted = (len(self.streams), *shape)
        if self.compute.shape != shape or self.weights.shape[:3] != wanted or self.weights.ndim != 4:
            raise PlanError(
                f"a plan of {shape[0]} steps and {shape[1]} regions needs compute {shape} and weights "
                f"{(*wanted, 'depth')}, got {self.compute.shape} and {self.weights.shape}"
            )
        if 0 in self.weights.shape:
            raise PlanError(f"a plan needs a stream, a step, a region and a depth, got weights {self.weights.shape}")
        if not np.isfinite(self.weights).all():
            raise PlanError("the plan's weights are not all finite: calibrate again")

    @property
    def depth(self) -> int:
        """How many residuals a slot must remember."""
        return int(self.weights.shape[3])

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def step_of(self, timestep: float) -> int:
        """Returns the number of the step that is called with this timestep.

        Raises:
            PlanError: no step of the plan has it: the plan is for another number of steps or another scheduler.
        """
        known = np.asarray(self.timesteps)
        step = int(np.argmin(np.abs(known - timestep)))
        scale = max(float(np.abs(known).max()), 1e-6)
        if not abs(known[step] - timestep) <= 1e-3 * scale:
            raise PlanError(
                f"the model was called with timestep {timestep:g}, which is none of the plan's {self.num_steps} steps "
                f"({known[0]:g}, {known[min(1, len(known) - 1)]:g} … {known[-1]:g}): calibrate for this schedule"
            )
        return step

    def weights_of(self, stream: str, step: int) -> NDArray[np.float32]:
        """Returns the weights (R, depth) of a step; a stream the plan does not know takes those of the first."""
        return self.weights[self.streams.index(stream) if stream in self.streams else 0, step]

    def check_model(self, fingerprint: str, regions: tuple[str, ...]) -> None:
        """
        Raises:
            PlanError: the plan was calibrated on another model.
        """
        if self.regions != regions or self.fingerprint != fingerprint:
            raise PlanError(
                f"the plan is for a model with {len(self.regions)} regions and fingerprint {self.fingerprint[:12]}, "
                f"this model has {len(regions)} and {fingerprint[:12]}: calibrate this model"
            )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
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
        }
        header["checksum"] = _checksum(header, arrays)
        save_file(arrays, str(path), metadata={"quantcache_plan": json.dumps(header)})

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
            header = _Header.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"{path}: the plan's header is invalid: {error.errors()[0]['msg']}") from error
        if header.version != VERSION:
            raise PlanError(f"{path}: plan version {header.version}, this quantcache reads {VERSION}: calibrate again")
        fields = header.model_dump()
        checksum = fields.pop("checksum")
        if set(arrays) != {"compute", "weights"} or checksum != _checksum(fields, arrays):
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
        )


def _checksum(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
