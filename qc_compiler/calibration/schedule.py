"""The calibrated schedule: which steps to compute for a given share of the work, and how to fill in the others.

    1. One full trajectory is recorded: samples x_i and predictions v_i.
    2. Dynamic programming over the steps: the cost of skipping i after computing c₀ > c₁ > c₂ is
           min_w ‖Σⱼ wⱼ·v_{cⱼ} − v_i‖²,        read from the Gram matrix of the predictions
    3. Closed loop: the schedule is run, and the weights of each skipped step are fitted to what the model should have
       predicted *there*, on the trajectory that the skips before produced, so that the sample returns to its path:
           v*_i = v_i + (a/b)·(x_i − x̂_i)        with a, b of the sampler's step (`Recording.feedback`)
    4. Single computed steps are moved while the measured error of the result falls.

Sources: ours. A skipped step's prediction as a linear combination of earlier ones is a multistep solver whose
coefficients are fitted to this model instead of to polynomials (compare DPM-Solver++, arXiv 2211.01095).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from ..errors import OptionError, QuantCacheError
from ..extrapolation import polynomial_weights
from ..plan import Plan
from ..registry import runtime_of
from ..runtime import GuardedGraph, Position, StreamState
from .recording import Recording, flat

DEPTH = 3  # predictions a skipped step is made of: one more changed nothing on the example model
RIDGE = 1e-5  # relative; keeps the fitted weights near polynomial extrapolation where the data does not decide


def calibrate(
    model: Any,
    generate: Callable[[Any], Any],
    share: float = 0.33,
    *,
    rounds: int = 8,
    progress: bool = True,
    backend: Any = "quantcache",
) -> Plan:
    """Measures, for this model and this number of steps, which steps to compute.

    Args:
        model: The model, plain or compiled.
        generate: The user's sampling function: takes a model to call, returns the samples as one tensor. It must do
            the same each time (fix the seed). A handful of samples is enough.
        share: Part of the block computations to spend, in (0, 1].
        rounds: Trajectories to spend on moving single steps; in all `rounds` + 3 are run.
        progress: Show a progress bar.
        backend: What compiles the model; tests pass one without Inductor.

    Returns:
        A plan of level `output` with the exact share it spends and its error on the calibration samples.

    Raises:
        OptionError: `share` lies outside (0, 1], or `generate` returns no tensor.
        QuantCacheError: `generate` did not run the model over several steps.
    """
    if not 0 < share <= 1:
        raise OptionError(f"share={share}: expected a part of the work in (0, 1]")
    module = getattr(model, "_orig_mod", model)
    options: dict[str, Any] = {
        "cache": "static",
        "interval": 1,
        "level": "output",
        "cache_order": DEPTH - 1,
        "strict": True,
    }
    compiled = torch.compile(module, backend=backend, options=options)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("compiling and recording", total=rounds + 3)

        def step(description: str) -> None:
            bar.update(task, advance=1, description=description)

        recording = Recording()
        reference = _run(compiled, generate, recording)
        if recording.num_steps < 3:
            raise QuantCacheError(f"generate(model) took {recording.num_steps} steps of the model: expected 3 or more")
        count = max(2, round(share * recording.num_steps))
        gram = recording.gram().numpy()

        @functools.cache
        def measure(computed: tuple[int, ...]) -> tuple[float, "_ClosedLoop"]:
            loop = _ClosedLoop(recording, computed)
            result = _run(compiled, generate, loop)
            step(f"{count} of {recording.num_steps} steps: best error {_relative(result, reference):.2e}")
            return _relative(result, reference), loop

        step("recorded")
        starts = {shortest_path(gram, count, depth) for depth in (2, DEPTH)}
        best = min(starts, key=lambda computed: measure(computed)[0])
        best = _improve(best, recording.num_steps, measure, rounds)
        error, loop = measure(best)
    runtime = runtime_of(compiled)
    return loop.plan(runtime.fingerprint, {"share": count / recording.num_steps, "error": error})


def shortest_path(gram: NDArray[np.float64], count: int, depth: int) -> tuple[int, ...]:
    """Returns the `count` steps to compute, in order, beginning with step 0.

    Args:
        gram: Inner products of the predictions, (N, N).
        count: How many steps to compute, at least 2 and at most N.
        depth: How many earlier predictions a skipped step may use.

    The state of the dynamic program is the last two computed steps; what came before them is that of the best path
    there, so for `depth` 3 it is a very good heuristic, for 2 exact.
    """
    total = len(gram)

    @functools.cache
    def skipped(known: tuple[int, ...], end: int) -> float:
        """Returns the cost of skipping everything between the newest of `known` and `end`."""
        if end - 1 <= known[0]:
            return 0.0
        return skipped(known, end - 1) + residual(gram, known, end - 1)

    paths: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(-1, 0): (0.0, (0,))}
    for k in range(1, count):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (_, last), (cost, path) in paths.items():
            known = path[::-1][:depth]
            for following in range(last + 1, total - (count - 1 - k)):
                candidate = cost + skipped(known, following)
                if candidate < longer.get((last, following), (math.inf,))[0]:
                    longer[last, following] = (candidate, (*path, following))
        paths = longer
    return min((cost + skipped(path[::-1][:depth], total), path) for cost, path in paths.values())[1]


def residual(gram: NDArray[np.float64], known: Sequence[int], step: int) -> float:
    """Returns min_w ‖Σⱼ wⱼ·v_{knownⱼ} − v_step‖², from the Gram matrix."""
    index = list(known)
    square, cross = gram[np.ix_(index, index)], gram[index, step]
    ridge = RIDGE * np.trace(square) / len(index) * np.eye(len(index))
    weights = np.linalg.solve(square + ridge, cross)
    return max(float(gram[step, step] - 2 * weights @ cross + weights @ square @ weights), 0.0)


def _improve(
    best: tuple[int, ...], total: int, measure: Callable[[tuple[int, ...]], tuple[float, Any]], rounds: int
) -> tuple[int, ...]:
    """Moves single computed steps by one while the measured error falls, for at most `rounds` trajectories."""
    order = np.random.default_rng(0).permutation([(i, by) for i in range(1, len(best)) for by in (-1, 1)])
    for i, by in order:
        if rounds <= 0:
            break
        moved = tuple(sorted({*best[:i], best[i] + int(by), *best[i + 1 :]}))
        if len(moved) == len(best) and moved[-1] < total:
            rounds -= 1
            best = min(best, moved, key=lambda computed: measure(computed)[0])
    return best


class _ClosedLoop:
    """Steers a run by a list of computed steps and fits the weights of the others on the way."""

    def __init__(self, recording: Recording, computed: Sequence[int]) -> None:
        self.recording = recording
        self.streams, steps = tuple(recording.outputs), recording.num_steps
        self.compute = np.zeros((steps, 1), dtype=np.bool_)
        self.compute[list(computed)] = True
        self.weights = np.zeros((len(self.streams), steps, 1, DEPTH), dtype=np.float32)

    def decide(
        self, graph: GuardedGraph, position: Position, state: StreamState, inputs: Sequence[Any]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]] | None:
        step, stream, history = position.step, position.stream, list(state.history[0])
        if step >= len(self.compute) or stream not in self.streams:
            raise QuantCacheError("generate(model) did not repeat the steps of its first run: fix its seed and steps")
        weights = self.weights[self.streams.index(stream), step]
        if not self.compute[step] and history:
            assert graph.latent is not None
            deviation = self.recording.inputs[stream][step] - flat(inputs[graph.latent])
            wanted = self.recording.outputs[stream][step] + self.recording.feedback(step) * deviation
            basis = torch.stack([flat(tensors[0]) for _, tensors in history]).double()
            prior = polynomial_weights([c for c, _ in history[:2]], self.recording.timesteps[step])
            weights[0, : len(history)] = _fit(basis, wanted.double(), prior)
        return self.compute[step], weights

    def observe(self, *_: Any) -> None:
        pass

    def plan(self, fingerprint: str, measured: dict[str, float]) -> Plan:
        timesteps = tuple(self.recording.timesteps)
        return Plan(fingerprint, "output", ("output",), timesteps, self.compute, self.weights, self.streams, measured)


def _fit(basis: Tensor, wanted: Tensor, prior: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the weights (H,) with which `basis` (H, n) comes closest to `wanted` (n,), near `prior` in doubt."""
    start = torch.zeros(len(basis), dtype=torch.float64)
    start[: len(prior)] = torch.from_numpy(prior)
    square = basis @ basis.T
    ridge = RIDGE * square.trace() / len(basis) * torch.eye(len(basis), dtype=torch.float64)
    step = torch.linalg.solve(square + ridge, basis @ (wanted - start @ basis))
    return (start + step).float().numpy()


def _run(compiled: Any, generate: Callable[[Any], Any], pilot: Any) -> Tensor:
    """Runs `generate` once with `pilot` at the helm of the runtime; returns its samples."""
    try:
        runtime_of(compiled).pilot = pilot
    except QuantCacheError:  # not compiled yet: the first run is computed in full anyway
        generate(compiled)
        runtime_of(compiled).pilot = pilot
    runtime = runtime_of(compiled)
    try:
        runtime.reset()
        result = generate(compiled)
    finally:
        runtime.pilot = None
    if not isinstance(result, Tensor):
        raise OptionError(f"generate(model) returned {type(result).__name__}: expected the samples as one tensor")
    return flat(result)


def _relative(result: Tensor, reference: Tensor) -> float:
    return float((result - reference).norm() / reference.norm())
