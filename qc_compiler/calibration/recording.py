"""Looks over the runtime's shoulder: what went into a model and came out of it at every step of a trajectory."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import OptionError, QuantCacheError
from ..registry import runtime_of
from ..runtime import GuardedGraph, Pilot, Runtime
from ..trajectory import MAX_STREAMS, Position, StreamState

COMPUTE_ALL: dict[str, Any] = {"cache": "static", "interval": 1, "level": "output", "strict": True}  # every step


@dataclass
class Recording(Pilot):
    """One trajectory in which every step was computed.

    Attributes:
        timesteps: In order; N of them.
        inputs: For each stream N flat samples, float32 on the CPU.
        outputs: For each stream N flat predictions, float32 on the CPU.
        latent_shape, prediction_shape: Before they were made flat.
        bare_steps: Where the runtime had nothing to reuse: at step 0, and at step 1 if an input beside sample and
            timestep changed after the first.
    """

    timesteps: list[float] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    latent_shape: tuple[int, ...] = ()
    prediction_shape: tuple[int, ...] = ()
    bare_steps: list[int] = field(default_factory=lambda: [0])

    def decide(self, graph: GuardedGraph, position: Position, state: StreamState, *_: Any) -> None:
        """Leaves it to the rule, which computes everything."""
        if position.step > self.bare_steps[-1] and not state.history[0]:
            self.bare_steps.append(position.step)

    def observe(
        self, graph: GuardedGraph, position: Position, timestep: float | None, inputs: Any, results: Any
    ) -> Any:
        """Takes one call of the model; returns its results as they are.

        Raises:
            QuantCacheError: the model predicts NaN or Inf, the trajectory is a second one, or streams differ in shape.
        """
        if position.step == len(self.timesteps):
            self.timesteps.append(float(position.step) if timestep is None else timestep)
        if position.step < (known := len(self.inputs.get(position.stream, []))):
            raise QuantCacheError(
                f"generate(model) sampled more than once: after {known} steps the timestep turned back, or came more "
                f"than {MAX_STREAMS} times, or the sample jumped (fresh noise at every step?), or the batch had another"
                " shape. Let it make one batch, of the same rows at every step"
            )
        assert graph.latent is not None
        shapes = tuple(inputs[graph.latent].shape), tuple(results[0].shape)
        if self.inputs and shapes != (self.latent_shape, self.prediction_shape):
            raise QuantCacheError(
                f"generate(model) called stream {position.stream!r} with a sample of {shapes[0]}, and another one with "
                f"{self.latent_shape}: a plan needs streams of one shape"
            )
        self.latent_shape, self.prediction_shape = shapes
        self.inputs.setdefault(position.stream, []).append(flat(inputs[graph.latent]))
        self.outputs.setdefault(position.stream, []).append(flat(results[0]))
        if not self.outputs[position.stream][-1].isfinite().all():
            raise QuantCacheError(f"the model predicts NaN or Inf at step {position.step}: nothing can be measured")
        return results

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def check(self) -> None:
        """
        Raises:
            QuantCacheError: a stream is not called at every step, or finds nothing to reuse in the midst of the run.
        """
        if late := [step for step in self.bare_steps if step > 1]:
            raise QuantCacheError(
                f"nothing was there to reuse at step {late[0]}: the weights, or the sizes of an input, changed during "
                "generate(model). Let them stay the same from step to step"
            )
        for stream, outputs in self.outputs.items():
            if len(outputs) != self.num_steps:
                raise QuantCacheError(
                    f"generate(model) called stream {stream!r} at {len(outputs)} of {self.num_steps} steps (guidance "
                    "in a part of them?): a plan needs every stream at every step"
                )

    def rows_of_samples(self) -> Tensor:
        """Returns which rows of the model's batch are one sample in the end, int64 (B, k), in the order of the first.

        k is 2 for guidance in one call. Where rows are frames, B is the number of these; of packed tokens it is 1.
        """
        rows = next(iter(self.inputs.values()))[-1][self._aligned()[0]].view(self.latent_shape[0], -1)
        _, sample, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
        if (counts != counts[0]).any():
            return torch.arange(len(rows))[:, None]
        together = sample.argsort(stable=True).view(len(counts), -1)
        return together[together[:, 0].argsort()]

    def gram(self) -> Tensor:
        """Returns the inner products of the predictions of all steps, float64 (N, N), summed over the streams."""
        stacks = [torch.stack(outputs).double() for outputs in self.outputs.values()]
        return sum((stack @ stack.T for stack in stacks), torch.zeros(()))

    def _aligned(self) -> tuple[slice | Tensor, slice | Tensor | None]:
        """Returns what of a flat input and of a flat prediction belongs together; None for the latter if unknown.

        All; or, where one has more channels, a part of those: variances are predicted behind the others, an image to
        start from is given behind the sample, or before it.
        """
        shapes = self.latent_shape, self.prediction_shape
        if math.prod(shapes[0]) == math.prod(shapes[1]):
            return slice(None), slice(None)
        apart = [d for d, sizes in enumerate(zip(*shapes)) if sizes[0] != sizes[1]]
        if len(shapes[0]) != len(shapes[1]) or len(apart) != 1 or apart == [0]:
            return slice(None), None
        (at,), width = apart, min(shape[apart[0]] for shape in shapes)
        of_input, of_prediction = (torch.arange(math.prod(shape)).view(shape) for shape in shapes)
        inputs, rest = next(iter(self.inputs.values())), shapes[0][at] - width
        before = of_input.narrow(at, 0, rest).flatten()
        start = rest if torch.equal(inputs[0][before], inputs[-1][before]) else 0
        return of_input.narrow(at, start, width).flatten(), of_prediction.narrow(at, 0, width).flatten()

    def sampler_step(self, step: int) -> tuple[float, NDArray[np.float64]]:
        """Returns a and b (S,) of the sampler's step

            x_{i+1} = a·x_i + Σ_streams b_s·v_i + Σ_streams c_s·v_{i−1}

        fitted to the recorded trajectory. Zeros where it is not of that form (a stochastic sampler) or is the last.
        x and v are of the channels that input and prediction share. Of guidance in one call, whose halves move the
        sample as streams do, b_s is their sum.
        """
        of_input, of_prediction = self._aligned()
        unknown = 0.0, np.zeros(len(self.outputs))
        if step + 1 >= self.num_steps or of_prediction is None:
            return unknown
        rows = self.rows_of_samples()

        def halves(values: Tensor, index: slice | Tensor) -> list[Tensor]:
            parts = values[index].view(rows.numel(), -1)[rows].double()
            return [part.flatten() for part in parts.unbind(1)]

        inputs = next(iter(self.inputs.values()))
        columns = [halves(inputs[step], of_input)[0]]
        for at in (step, step - 1) if step else (step,):
            for outputs in self.outputs.values():
                columns += halves(outputs[at], of_prediction)
        basis, target = torch.stack(columns, dim=1), halves(inputs[step + 1], of_input)[0]
        solution = torch.linalg.lstsq(basis, target[:, None], driver="gelsd").solution[:, 0]
        b = solution[1 : 1 + len(self.outputs) * rows.shape[1]].view(len(self.outputs), -1).sum(1).numpy()
        if (basis @ solution - target).norm() / target.norm() > 0.01 or abs(b.sum()) < 1e-6:
            return unknown
        return float(solution[0]), b

    def wanted(self, stream: int, step: int, sample: Tensor, earlier: Sequence[Tensor], gain: float) -> Tensor:
        """Returns what a stream should predict at a step for the sample to return to its recorded path,

            v*_s = v_s + f + Σ_{q<s} b_q/b_s·(v_q + f − v̂_q),      f = g·(a/Σb)·(x_i − x̂_i)

        so that the last stream makes up for what those before it missed.

        Args:
            stream: s.
            step: i.
            sample: x̂_i, flat: the input, where the sample is now.
            earlier: v̂_q, flat: what the streams before this one predicted at this step.
            gain: g, how much of the deviation is taken back at once.
        """
        recorded = list(self.outputs.values())
        wanted = recorded[stream][step].double()
        (a, b), (of_input, steering) = self.sampler_step(step), self._aligned()
        if not b.any():
            return wanted
        assert steering is not None
        feedback = gain * a / b.sum() * (list(self.inputs.values())[stream][step] - sample)[of_input]
        wanted[steering] += feedback
        if abs(b[stream]) > 1e-3 * abs(b).max():
            for q, predicted in enumerate(earlier):
                wanted[steering] += b[q] / b[stream] * ((recorded[q][step] - predicted)[steering] + feedback)
        return wanted


def flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).float().cpu()


def by_sample(result: Tensor) -> Tensor:
    """Returns samples (B, …) as (B, n), float32 on the CPU; what has one dimension is one sample."""
    return flat(result).view(len(result) if result.dim() > 1 else 1, -1)


def run_steered(compiled: Any, generate: Callable[[Any], Any], pilot: Pilot) -> Tensor:
    """Runs `generate` once with `pilot` at the helm of the runtime; returns its samples (B, n)."""
    runtime = compiled_runtime(compiled, generate)
    runtime.pilot = pilot
    try:
        runtime.reset()
        result = generate(compiled)
    finally:
        runtime.pilot = None
    if not isinstance(result, Tensor):
        raise OptionError(f"generate(model) returned {type(result).__name__}: expected the samples as one tensor")
    return by_sample(result)


def compile_static(module: Any, backend: Any, options: Mapping[str, Any]) -> Any:
    """Compiles a model for the sizes that it is called with: attention is rewritten for known ones only."""
    return torch.compile(module, backend=backend, options=dict(options), dynamic=False)


def forget_graphs(module: nn.Module) -> None:
    """Lets Dynamo forget what it compiled of a model: those graphs would count as recompilations later."""
    forward = inspect.unwrap(module.forward)
    while isinstance(forward, functools.partial):  # as hooks leave it
        forward = inspect.unwrap(forward.func)
    if (code := getattr(forward, "__code__", None)) is not None:
        torch._dynamo.eval_frame.reset_code(code)


def compiled_runtime(compiled: Any, generate: Callable[[Any], Any]) -> Runtime:
    """Returns the runtime of a compiled model; the first call of `generate` compiles it, if nothing has."""
    with contextlib.suppress(QuantCacheError):
        return runtime_of(compiled)

    def stop(*_: Any) -> None:
        raise _Called

    handle = compiled.register_forward_hook(stop)
    try:
        generate(compiled)
    except _Called:
        pass
    finally:
        handle.remove()
    return runtime_of(compiled)


class _Called(Exception):
    """Ends a generation at the model's first call; carries its arguments."""


def first_call(module: nn.Module, generate: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments with which `generate` first calls the model; the model itself does not run.

    Raises:
        QuantCacheError: it never does.
    """

    def stop(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        generate(module)
    except _Called as call:
        args, kwargs = call.args
        return args, kwargs
    finally:
        handle.remove()
    raise QuantCacheError("generate(model) never called the model")
