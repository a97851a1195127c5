"""Where a call belongs: which sampling run, which of its streams, which step.

A run is followed by its timestep: going on means the next step, the same one again means another stream (guidance),
turning back means a new trajectory; so does an input that jumped further than one sampler step can take it. A run that
was given up in its first step and begun again is known at the second: by what its first call goes on with.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .controllers import Step
from .statistics import Statistic, ratios

MAX_STREAMS = 8  # calls at one timestep; more than that is somebody timing a single step, not guidance
JUMP = 1.0  # relL1 of an input to the call before: independent noise gives √2, one sampler step stays below 1


class Call:
    """What a call of the model is told by.

    Attributes:
        timestep: None if the model has none.
        sample: A few elements of the main input, if it has one.
        given: A fingerprint of each other input: labels, text, images to start from. Taken only where needed, since
            each is a copy from the device.
    """

    def __init__(self, timestep: Any, latent: Tensor | None, others: Iterable[Tensor]) -> None:
        self.timestep = None if timestep is None else _as_float(timestep)
        self.sample = None if latent is None else _elements(latent)
        self._others = others

    @cached_property
    def given(self) -> list[NDArray[np.float32]]:
        return [_fingerprint(tensor) for tensor in self._others]

    def is_given_what(self, stream: "StreamState") -> bool:
        pairs = zip(self.given, stream.given)
        return len(self.given) == len(stream.given) and all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@dataclass
class StreamState:
    """One stream of a trajectory.

    Attributes:
        steps: What was decided and measured, with the statistics still on the device until they are read.
        history: For each region its computed steps, newest first: (coordinate, tensors of its slots).
        latest: What it last predicted, computed or not; empty where no plan mixes streams.
        beside: What the stream called before had predicted when this one's output was computed, newest first.
        kept: For each layer that keeps attention heads their last outputs, None before the first.
        rows: Of `modes` when they were kept: which head stands where.
        layout: Shapes, dtypes and devices of what its slots hold.
        sample: A few elements of the last input.
        given: What the model was given at its first step beside sample and timestep.
        weights_version: Of the model's parameters when the slots were filled.
    """

    steps: list["PendingStep"] = field(default_factory=list)
    history: list[deque[tuple[float, list[Tensor]]]] = field(default_factory=list)
    latest: list[Tensor] = field(default_factory=list)
    beside: deque[list[Tensor]] = field(default_factory=deque)
    kept: list[Tensor | None] = field(default_factory=list)
    rows: NDArray[np.int32] | None = None
    layout: Any = None
    sample: NDArray[np.float32] | None = None
    given: list[NDArray[np.float32]] = field(default_factory=list)
    weights_version: int = 0

    def clear_slots(self) -> None:
        for slots in self.history:
            slots.clear()
        self.latest = []
        self.beside.clear()
        self.kept = [None] * len(self.kept)


@dataclass
class PendingStep:
    """A step whose statistics may not have arrived on the host yet."""

    index: int
    timestep: float | None
    computed: NDArray[np.bool_]
    pending: Sequence[Tensor]
    precision: NDArray[np.int_] | None = None
    modes: NDArray[np.int32] | None = None  # of the attention heads
    floor: NDArray[np.float32] | None = None  # what quantization alone adds to the change of each region
    pruned: NDArray[np.bool_] | None = None  # None where nothing is
    num_bounded: int = 0
    read: Step | None = None

    def resolve(self) -> Step:
        """Returns the step as rules see it: no change below the noise floor."""
        if self.read is None:
            statistics = np.zeros((len(self.computed), len(Statistic)), dtype=np.float32)
            if self.pending:
                statistics[self.computed] = ratios(torch.stack(list(self.pending)).cpu().numpy()[self.computed])
            if self.floor is not None:
                change, floor = statistics[:, Statistic.CHANGE], np.where(self.computed, self.floor, 0)
                self.num_bounded = int((change < floor).sum())
                np.maximum(change, floor, out=change, where=~np.isnan(change))
            self.read, self.pending = Step(self.index, self.computed, statistics, self.pruned), ()
        return self.read


@dataclass
class Trajectory:
    """One sampling run of one thread: its steps so far and its streams."""

    name: str | None
    streams: list[StreamState] = field(default_factory=list)
    timestep: float | None = None
    direction: float = 0.0
    step: int = -1
    turn: int = -1  # which stream was called last at this timestep
    num_steps: int | None = None
    first: float | None = None  # timesteps of its first two steps
    second: float | None = None


@dataclass(frozen=True)
class Position:
    """Where a call belongs; written into the trajectory when the call has succeeded."""

    trajectory: Trajectory
    is_new: bool
    step: int
    turn: int

    @property
    def stream(self) -> str:
        """Name of the stream: the user's, or the number of the call among those with one timestep."""
        return self.trajectory.name or str(self.turn)


def locate(now: Trajectory | None, call: Call, num_steps: int | None) -> Position | None:
    """Returns where a call goes on with a trajectory; None where it begins a new one.

    Args:
        num_steps: Length of the trajectory, if known, for models without a timestep.
    """
    if now is None:
        return None
    if call.timestep is None:  # steps are counted
        ends = num_steps is not None and now.step + 1 >= num_steps
        return None if ends or _jumped(now, 0, call) else Position(now, False, now.step + 1, 0)
    assert now.timestep is not None
    if call.timestep == now.timestep:
        position = Position(now, False, now.step, now.turn + 1)
        return None if position.turn >= MAX_STREAMS or (now.step and _jumped(now, position.turn, call)) else position
    if now.direction and direction_of(now.timestep, call.timestep) != now.direction:
        return None
    if now.step == 0 and (begun := _begun_at(now, call)):
        now = replace(now, streams=now.streams[begun:])
        return Position(now, True, 1, 0)
    return None if _jumped(now, 0, call) else Position(now, False, now.step + 1, 0)


def _begun_at(trajectory: Trajectory, call: Call) -> int:
    """Returns which of the calls of the first step this one goes on with: those before are of a run that was given up.

    The first call, unless it came again: a run may be begun anew with the same noise, label and timestep. Where this
    call cannot go on with the first, the last that it can go on with.
    """
    streams = trajectory.streams
    fits = [i for i, stream in enumerate(streams) if not _jumped(trajectory, i, call) and call.is_given_what(stream)]
    first = streams[0].sample
    if 0 in fits and first is not None:
        fits = [i for i in fits if np.array_equal(streams[i].sample, first)]  # type: ignore[arg-type]
    return 0 if not fits or first is None else fits[-1]


def _jumped(trajectory: Trajectory, turn: int, call: Call) -> bool:
    if call.sample is None or turn >= len(trajectory.streams):
        return False
    before = trajectory.streams[turn].sample
    if before is None or before.shape != call.sample.shape:
        return True
    change = np.add.reduce(np.abs(call.sample - before)) / (np.add.reduce(np.abs(before)) + 1e-12)
    return not change < JUMP


def direction_of(before: float, after: float) -> float:
    """Returns 1 where time went up, -1 where it went down, 0 where it stood or is no number."""
    return float(after > before) - float(after < before)


def _as_float(timestep: Any) -> float:
    """Returns a step's timestep; of a tensor its largest element (some models clamp single tokens to 0)."""
    return float(timestep.max().item()) if isinstance(timestep, Tensor) else float(timestep)


def _elements(tensor: Tensor) -> NDArray[np.float32]:
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // 256)
    return flat[: 256 * stride : stride].to("cpu", torch.float32, copy=True).numpy()  # samplers may write to it


def _fingerprint(tensor: Tensor) -> NDArray[np.float32]:
    """Returns what tells a tensor from another one, wherever they differ: a few elements and the sum of all."""
    total = tensor.detach().double().sum().float().cpu().numpy()
    return np.append(_elements(tensor), total)
