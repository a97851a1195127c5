"""Fits the correction of the model's output (VC, `qc_compiler.compensation`), step after step of a trajectory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..compensation import compensate, fit_correction
from ..errors import QuantCacheError
from ..plan import Plan
from ..registry import runtime_of
from ..runtime import GuardedGraph, Pilot
from ..trajectory import Position
from .recording import Recording, run_steered


class _Fit(Pilot):
    """Corrects each output as soon as it is there, so that each correction is found with those before it active."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.corrections: dict[str, list[Tensor]] = {}

    def observe(self, graph: GuardedGraph, position: Position, timestep: Any, inputs: Any, results: Any) -> Any:
        known = self._recording.outputs.get(position.stream, [])
        if position.step >= len(known):
            raise QuantCacheError("generate(model) did not repeat the steps of its first run: fix its seed and steps")
        first, *others = results
        correction = fit_correction(first, known[position.step].view(first.shape).to(first.device))
        self.corrections.setdefault(position.stream, []).append(correction.cpu())
        return (compensate(first, correction), *others)


def fit_compensation(compiled: Any, generate: Callable[[Any], Any], recording: Recording, plan: Plan | None) -> Plan:
    """Returns the plan with a correction for every step and channel.

    Args:
        compiled: The compressed model.
        generate: As of `calibrate`.
        recording: Of the full model.
        plan: What the compressed model was compiled with, or None.
    """
    fit = _Fit(recording)
    run_steered(compiled, generate, fit)
    streams = tuple(fit.corrections)
    compensation = np.stack([np.stack([c.numpy() for c in fit.corrections[stream]]) for stream in streams])
    if plan is not None and plan.has_schedule:
        order = [streams.index(stream) for stream in plan.streams]
        return replace(plan, compensation=compensation[order])
    return Plan.without_schedule(
        runtime_of(compiled).fingerprint,
        tuple(recording.timesteps),
        streams,
        quantization=plan.quantization if plan else None,
        compensation=compensation,
    )
