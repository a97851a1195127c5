"""The calibrated schedule: which steps to compute for a given share of the work, and how to fill in the others.

    1. One full trajectory is recorded: samples x_i and predictions v_i.
    2. Dynamic programming over the steps: the cost of skipping i after computing c₀ > c₁ > c₂ is
           min_w ‖Σⱼ wⱼ·v_{cⱼ} − v_i‖²,        read from the Gram matrix of the predictions
    3. Closed loop: the schedule is run, and the weights of each skipped step are fitted to what the model should have
       predicted *there*, on the trajectory that the skips before produced, so that the sample returns to its path:
           v*_i = v_i + g·(a/b)·(x_i − x̂_i)      with a, b of the sampler's step (`Recording.feedback`)

       The gain g is measured too: 1 returns at once, which overshoots where guidance amplifies what two streams miss.
    4. The best of a few such lists of steps and of evenly spaced ones is taken, and single computed steps
       are moved while the measured error of the result falls.
    5. Partial computation: a computed step is given up for two steps that compute half of the blocks and extrapolate
       the others, where that lowers the measured error. If it never does, the plan guards the output alone.

Sources: ours. A skipped step's prediction as a linear combination of earlier ones is a multistep solver whose
coefficients are fitted to this model instead of to polynomials (compare DPM-Solver++, arXiv 2211.01095).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from ..errors import OptionError, QuantCacheError
from ..extrapolation import polynomial_weights
from ..graph import RegionSpec
from ..plan import Plan
from ..registry import runtime_of
from ..runtime import GuardedGraph, Position, Runtime, StreamState
from ..trajectory_summary import computed_share
from .recording import Recording, flat, run_steered

DEPTH = 3  # predictions a skipped step is made of: one more changed nothing on the example model
GAINS = (0.1, 0.0, 0.3, 1.0)  # of the feedback; the first one is where the search begins
RIDGE = 1e-5  # relative; keeps the fitted weights near polynomial extrapolation where the data does not decide


def find_schedule(
    model: Any,
    generate: Callable[[Any], Any],
    share: float,
    *,
    budget: float = 8.0,
    level: str = "output+block",
    progress: bool = True,
    backend: Any = "quantcache",
) -> Plan:
    """Returns a plan with the best schedule found; see `qc_compiler.calibration.calibrate`."""
    if not 0 < share <= 1:
        raise OptionError(f"share={share}: expected a part of the work in (0, 1]")
    module = getattr(model, "_orig_mod", model)
    options: dict[str, Any] = {
        "cache": "static",
        "interval": 1,
        "level": level,
        "cache_order": DEPTH - 1,
        "strict": True,
    }
    compiled = torch.compile(module, backend=backend, options=options)
    with Progress(disable=not progress, transient=True) as bar:
        num_candidates = max(12, round(budget / share))
        task = bar.add_task("compiling and recording", total=num_candidates + 1)

        def step(description: str) -> None:
            bar.update(task, advance=1, description=description)

        recording = Recording()
        reference = run_steered(compiled, generate, recording)
        if recording.num_steps < 3:
            raise QuantCacheError(f"generate(model) took {recording.num_steps} steps of the model: expected 3 or more")
        count = max(2, round(share * recording.num_steps))
        gram = recording.gram().numpy()

        regions = runtime_of(compiled).interface.regions  # type: ignore[union-attr]

        @functools.cache
        def measure(schedule: Schedule, gain: float) -> tuple[float, "_ClosedLoop"]:
            loop = _ClosedLoop(recording, schedule, len(regions), gain)
            error = _relative(run_steered(compiled, generate, loop), reference)
            step(f"{count} of {recording.num_steps} steps: last error {error:.1e}")
            return error, loop

        def best_of(*schedules: Schedule) -> Schedule:
            return min(schedules, key=lambda schedule: measure(schedule, gain)[0])

        def search(best: Schedule, candidates: Callable[[Schedule], Iterator[Schedule]], count: int) -> Schedule:
            tried = {best}
            for _ in range(count):
                if (candidate := next((c for c in candidates(best) if c not in tried), None)) is None:
                    break
                tried.add(candidate)
                best = best_of(best, candidate)
            return best

        step("recorded")
        first = starts(gram, count)
        gain = GAINS[0]
        best = best_of(*map(whole_steps, first))
        gain = min(GAINS, key=lambda gain: measure(best, gain)[0])
        rest = num_candidates - len(first) - len(GAINS) + 1
        partial = rest // 3 if len(regions) > 1 else 0
        best = search(best, lambda now: moves(now, recording.num_steps), rest - partial)
        best = search(best, lambda now: exchanges(now, recording.num_steps, regions), partial)
        error, loop = measure(best, gain)
    share = computed_share(regions, [loop.compute])
    return loop.plan(runtime_of(compiled), level, {"share": share, "error": error})


def starts(gram: NDArray[np.float64], count: int) -> list[tuple[int, ...]]:
    """Returns the lists of steps that the search starts from.

    They are the shortest paths, evenly spaced steps, what lies between, and steps along a power law. A shortest path
    knows each prediction on the full trajectory only; for very few steps the errors that skipped steps feed into each
    other count for more, and regular spacing bounds those.
    """
    last = len(gram) - 1
    paths = [np.array(shortest_path(gram, count, depth), dtype=np.float64) for depth in (2, DEPTH)]
    even = np.linspace(0, 1, count)
    powers = [last * even**power for power in (0.8, 1.0, 1.25, 1.5)]
    spaced = [*paths, *powers, (powers[1] + paths[-1]) / 2]
    distinct = {tuple(int(step) for step in np.round(steps)) for steps in spaced}
    return [steps for steps in sorted(distinct) if len(set(steps)) == count]


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


Schedule = tuple[tuple[int, tuple[int, ...]], ...]  # (step, its computed blocks); no blocks means all of them


def whole_steps(computed: Sequence[int]) -> Schedule:
    return tuple((step, ()) for step in sorted(computed))


def moves(schedule: Schedule, num_steps: int) -> Iterator[Schedule]:
    """Yields schedules with one computed step moved by up to three, in a fixed random order."""
    steps = [step for step, _ in schedule]
    order = np.random.default_rng(0).permutation(
        [(i, by) for i in range(1, len(steps)) for by in (-3, -2, -1, 1, 2, 3)]
    )
    for i, by in order:
        moved = {*steps[:i], steps[i] + int(by), *steps[i + 1 :]}
        if len(moved) == len(steps) and 0 < steps[i] + by < num_steps:
            yield whole_steps(sorted(moved))


def exchanges(schedule: Schedule, num_steps: int, regions: Sequence[RegionSpec]) -> Iterator[Schedule]:
    """Yields schedules in which one whole step gave way to two, before and behind it, of half of the blocks each.

    The half is the first, the last, or every second block (which are the spatial ones of many video models).
    """
    blocks = range(1, len(regions))
    middle = len(blocks) // 2
    halves = (tuple(blocks[middle:]), tuple(blocks[:middle]), tuple(blocks[::2]), tuple(blocks[1::2]))
    steps = {step for step, _ in schedule}
    rng = np.random.default_rng(1)
    for index in rng.permutation(np.arange(1, len(schedule))):
        step = schedule[index][0]
        free = [s for s in range(1, num_steps) if s not in steps]
        before, behind = ([s for s in free if s < step][-1:], [s for s in free if s > step][:1])
        if before and behind:
            half = halves[int(rng.integers(len(halves)))]
            kept = [entry for entry in schedule if entry[0] != step]
            yield tuple(sorted([*kept, (before[0], half), (behind[0], half)]))


class _ClosedLoop:
    """Steers a run by a schedule and fits the weights of its skipped steps on the way."""

    def __init__(self, recording: Recording, schedule: Schedule, num_regions: int, gain: float) -> None:
        self.recording, self.gain = recording, gain
        self.streams, steps = tuple(recording.outputs), recording.num_steps
        self.compute = np.zeros((steps, num_regions), dtype=np.bool_)
        for step, blocks in schedule:
            self.compute[step, [0, *(blocks or range(1, num_regions))]] = True
        self.weights = np.zeros((len(self.streams), steps, num_regions, DEPTH), dtype=np.float32)

    def decide(
        self, graph: GuardedGraph, position: Position, state: StreamState, inputs: Sequence[Any]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32]] | None:
        step, stream, history = position.step, position.stream, list(state.history[0])
        if step >= len(self.compute) or stream not in self.streams:
            raise QuantCacheError("generate(model) did not repeat the steps of its first run: fix its seed and steps")
        weights = self.weights[self.streams.index(stream), step]
        if not self.compute[step, 0] and history:
            assert graph.latent is not None
            deviation = self.recording.inputs[stream][step] - flat(inputs[graph.latent])
            wanted = self.recording.outputs[stream][step] + self.gain * self.recording.feedback(step) * deviation
            basis = torch.stack([flat(tensors[0]) for _, tensors in history]).double()
            prior = polynomial_weights([c for c, _ in history[:2]], self.recording.timesteps[step])
            weights[0, : len(history)] = _fit(basis, wanted.double(), prior)
        elif self.compute[step, 0]:
            for region in np.flatnonzero(~self.compute[step]):
                known = [at for at, _ in state.history[region]][:2]
                weights[region, : len(known)] = polynomial_weights(known, self.recording.timesteps[step])
        return self.compute[step], weights

    def observe(self, *args: Any) -> Any:
        return args[-1]

    def plan(self, runtime: Runtime, level: str, measured: dict[str, float]) -> Plan:
        names = tuple(region.name for region in runtime.interface.regions)  # type: ignore[union-attr]
        partial = (self.compute[:, 1:] != self.compute[:, :1]).any()
        used = len(names) if partial else 1
        return Plan(
            runtime.fingerprint,
            level if partial else "output",
            names[:used],
            tuple(self.recording.timesteps),
            self.compute[:, :used],
            self.weights[:, :, :used],
            self.streams,
            measured,
        )


def _fit(basis: Tensor, wanted: Tensor, prior: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the weights (H,) with which `basis` (H, n) comes closest to `wanted` (n,), near `prior` in doubt."""
    start = torch.zeros(len(basis), dtype=torch.float64)
    start[: len(prior)] = torch.from_numpy(prior)
    square = basis @ basis.T
    ridge = RIDGE * square.trace() / len(basis) * torch.eye(len(basis), dtype=torch.float64)
    step = torch.linalg.solve(square + ridge, basis @ (wanted - start @ basis))
    return (start + step).float().numpy()


def _relative(result: Tensor, reference: Tensor) -> float:
    return float((result - reference).norm() / reference.norm())
