"""Chooses what each attention head does at each step: progressively, in one generation.

At every step and layer each candidate m of each head h is tried on the activations that the compressed prefix produces,

    error(h, m) = w_step · age⁴ · mean (o_m − o)² / mean over heads of mean (o − mean o)²

and an integer program chooses at most one candidate for a head, so that the saved operations are most and Σ error ≤ δ.
Candidates with an error ≥ 1.5·δ/H are dropped. The layer then runs as chosen, and so on to the end of the trajectory.
The first step is full. Savings are exact parts of the query–key pairs; a cached head saves all of them, and full
attention with scores from int8 codes, if it is a candidate, counts as a quarter.

    w_step      how much a step's error grows until the end: ‖samples − full samples‖² where all heads are cached at
                this step alone, over the error of those heads; of some steps, in a full generation each,
                interpolated (log) and scaled to a mean of 1
    age         steps since the head was full: what a cached or narrow head misses points the same way at each of them,
                and the next tokens are made of it; codes err at random and do not age

All layers keep step: heads are cached or narrow only where most of those before them in the call are, those of the
first layer only where most of them would be; and at a step behind such a one only where most heads of all layers are
expected to be, by the errors of the candidates when they were last tried. For a head that is full on tokens which stale
heads before it have made is stale too, though no error shows that, and it would be what later steps reuse.

Source: DiTFastAttnV2, arXiv 2503.22796, section 4.2 and its code, where an error is relative to its own head, neither w
nor age counts and layers do not keep step. On our MMDiT (20 steps, 40 % of the pairs saved): with w and age alone
32 dB, in step 42 (four samples; 39 to 40 of eight); whole layers cached at every second or third step 38.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from .. import ops
from ..attention import CACHED, FULL, INT8, ROW, WINDOW, attended_share
from ..errors import QuantCacheError
from ..heads import ASK, half_width
from ..plan import HeadPlan, Plan
from ..registry import runtime_of
from ..runtime import GuardedGraph, Pilot
from ..trajectory import Position
from .recording import COMPUTE_ALL, compile_static, run_steered

WINDOWS = (1 / 8, 1 / 16, 1 / 32)
INT8_SAVES = 0.25  # of a head: half of its operations, at twice the rate
DROP = 1.5  # times δ/H: candidates that alone would take more than this part of the budget
AGING = 4  # exponent of a head's age; of 1, 2, 4 and 8 the last two did best, and alike
PROBES = 6  # steps whose weight is measured
IN_STEP = 0.5  # part of the heads that must be cached or narrow for others to be


@dataclass(frozen=True)
class Tried:
    """What the candidates of a layer's heads were worth at a step.

    Attributes:
        errors: (H, M), relative.
        savings: (M,), of a head's operations.
        ages: bool (M,), whether a candidate's error grows with the age of the head.
    """

    errors: NDArray[Any]
    savings: NDArray[Any]
    ages: NDArray[np.bool_]

    def are_stale(self, took: NDArray[np.int_]) -> NDArray[np.bool_]:
        """Returns bool (H,): which heads are cached or narrow with these candidates, −1 for none."""
        return self.ages[took] & (took >= 0)


@dataclass
class HeadSearch(Pilot):
    """Steers a model whose plan leaves its heads open, and keeps what it chose.

    Attributes:
        budget: δ, of the summed errors of a layer.
        candidates: What a head may do beside full and cached attention: parts of the vision tokens, or codes.
        weights: Of the steps, (N,); None weighs all alike, until `find_heads` measures them.
        timesteps: Of the steps so far.
        chosen: For each stream, step and layer what each head does, (H,).
        saved, total: Query–key pairs of all heads of the computed steps.
    """

    budget: float
    candidates: Sequence[float] = WINDOWS
    weights: NDArray[Any] | None = None
    timesteps: list[float] = field(default_factory=list)
    chosen: dict[tuple[str, int, int], NDArray[np.float32]] = field(default_factory=dict)
    saved: float = 0.0
    total: float = 0.0
    _now: tuple[str, int] = ("0", 0)
    _may_be_stale: bool = True  # what this call's heads may be
    _stale: dict[str, list[float]] = field(default_factory=dict)  # of a stream's last call, part of each layer's heads
    _last: dict[tuple[str, int], Tried] = field(default_factory=dict)  # of a stream's layer
    _age: dict[tuple[str, int], NDArray[Any]] = field(default_factory=dict)  # of a stream's layer, (H,)

    def decide(self, graph: GuardedGraph, position: Position, *_: Any) -> None:
        """Leaves it to the rule or the schedule which steps are computed."""
        self._now = position.stream, position.step
        self._may_be_stale = True
        if np.mean(self._stale.get(position.stream) or 0.0) >= IN_STEP:
            layers = [(tried, self._age[at]) for at, tried in self._last.items() if at[0] == position.stream]
            expected = [tried.are_stale(self.select(tried, age)).mean() for tried, age in layers]
            self._may_be_stale = bool(np.mean(expected) >= IN_STEP)
        self._stale[position.stream] = []

    def observe(self, graph: GuardedGraph, position: Position, timestep: Any, inputs: Any, results: Any) -> Any:
        if position.step == len(self.timesteps):
            self.timesteps.append(float(position.step) if timestep is None else timestep)
        return results

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, modes: Tensor, kept: Tensor | None, num_text: int, scale: float
    ) -> Tensor:
        """Runs the attention of one layer as it is chosen here; see `qc_compiler.ops.headwise_attention`."""
        if modes[WINDOW, 0] > ASK:  # nobody asks yet: the run that compiles
            return ops.attend(query, key, value, modes, kept, num_text, scale)
        (stream, step), layer = self._now, ASK - int(modes[WINDOW, 0])
        heads, tokens = query.shape[1:3]

        def run(code: int) -> Tensor:
            all_alike = torch.stack([torch.full_like(modes[ROW], code), modes[ROW]])
            return ops.attend(query, key, value, all_alike, kept, num_text, scale)

        full = run(FULL)
        tried: dict[float, tuple[int, Tensor]] = {}
        if self.tries(step) and any((stream, before, layer) in self.chosen for before in range(step)):
            tried[CACHED] = CACHED, run(CACHED)
        for share in self.candidates if self.tries(step) else ():
            code = half_width(share, tokens - abs(num_text))
            if code != FULL:
                tried[share] = code, run(code)
        chosen = np.full(heads, FULL, dtype=np.float32)
        output = full
        age = self._age.setdefault((stream, layer), np.ones(heads))
        if tried:
            errors = np.stack([relative_errors(candidate, full) for _, candidate in tried.values()], axis=1)
            unattended = np.array([1 - attended_share(code, tokens, num_text) for code, _ in tried.values()])
            savings = np.where([code == INT8 for code, _ in tried.values()], INT8_SAVES, unattended)
            known = Tried(errors, savings, np.array([share != INT8 for share in tried]))
            took = self.choose(known, age)
            self._last[stream, layer] = known
            output = full.clone()
            for head, m in enumerate(took):
                if m >= 0:
                    chosen[head] = list(tried)[m]
                    output[:, head] = list(tried.values())[m][1][:, head]
                    self.saved += float(unattended[m])
        is_fresh = np.isin(chosen, (FULL, INT8))
        self._age[stream, layer] = np.where(is_fresh, 1, age + 1)
        self._stale[stream].append(float(np.mean(~is_fresh)))
        self.total += heads
        self.chosen[stream, step, layer] = chosen
        return output

    def tries(self, step: int) -> bool:
        """Whether heads may do anything but full attention at a step."""
        return step > 0

    def choose(self, tried: Tried, age: NDArray[Any]) -> NDArray[np.int_]:
        """Chooses candidates (H,) for the heads of a layer at this step; `age` (H,) in steps."""
        took = self.select(tried, age)
        stale = np.mean(self._stale.get(self._now[0]) or tried.are_stale(took))
        if not self._may_be_stale or stale < IN_STEP:
            took = self.select(replace(tried, errors=np.where(tried.ages, np.inf, tried.errors)), age)
        return took

    def select(self, tried: Tried, age: NDArray[Any]) -> NDArray[np.int_]:
        """Returns what the budget allows at this step, whatever other layers do."""
        weight = 1.0 if self.weights is None else self.weights[min(self._now[1], len(self.weights) - 1)]
        aged = np.where(tried.ages, age[:, None] ** AGING, 1)
        return choose_heads(weight * aged * tried.errors, tried.savings, self.budget)

    def plan(self, layers: Sequence[str], streams: Sequence[str], order: str) -> HeadPlan:
        """Returns what was chosen; what never ran is full."""
        width = max(map(len, self.chosen.values()))
        windows = np.full((len(streams), len(self.timesteps), len(layers), width), FULL, dtype=np.float32)
        for (stream, step, layer), heads in self.chosen.items():
            windows[streams.index(stream), step, layer, : len(heads)] = heads
        return HeadPlan(tuple(layers), windows, order)


@dataclass
class Probe(HeadSearch):
    """Caches all heads at one step, or at none; keeps the mean error of these heads."""

    step: int = -1
    errors: list[float] = field(default_factory=list)

    def tries(self, step: int) -> bool:
        return step == self.step

    def choose(self, tried: Tried, age: NDArray[Any]) -> NDArray[np.int_]:
        self.errors.append(float(tried.errors[:, 0].mean()))
        return np.zeros(len(tried.errors), dtype=int)


def relative_errors(candidate: Tensor, full: Tensor) -> NDArray[np.float64]:
    """Returns each head's mean squared error over the variance of a head, float64 (H,), of outputs (B, H, S, D)."""
    error, reference = (x.double().transpose(0, 1).flatten(1) for x in (candidate - full, full))
    spread = (reference - reference.mean(dim=1, keepdim=True)).square().mean(dim=1)
    return (error.square().mean(dim=1) / spread.mean().clamp_min(1e-30)).cpu().numpy()


def choose_heads(errors: NDArray[Any], savings: NDArray[Any], budget: float) -> NDArray[np.int_]:
    """Chooses for each head the candidate that saves most, under a budget of errors for all.

    Args:
        errors: (H, M), of each candidate.
        savings: (M,).
        budget: Of the sum of the errors.

    Returns:
        int (H,): the candidate, or −1 for none.

    >>> choose_heads(np.array([[0.1, 0.0], [0.5, 0.1]]), np.array([1.0, 0.6]), 0.3).tolist()
    [0, 1]
    """
    heads, count = errors.shape
    is_allowed = (errors < DROP * budget / heads).ravel()  # not so for NaN
    if not is_allowed.any():
        return np.full(heads, -1)
    one_each = np.kron(np.eye(heads), np.ones(count))
    cost = np.where(is_allowed, errors.ravel(), 0.0) / budget  # the solver's tolerances are absolute
    result = milp(
        -np.tile(savings, heads),
        constraints=[LinearConstraint(one_each, ub=1), LinearConstraint(cost[None], ub=1)],
        bounds=Bounds(0, is_allowed.astype(float)),
        integrality=np.ones(heads * count),
    )
    taken = result.x.reshape(heads, count) > 0.5
    return np.where(taken.any(axis=1), taken.argmax(axis=1), -1)


def calibrate_heads(
    module: Any,
    generate: Callable[[Any], Any],
    plan: Plan,
    budget: float,
    windows: Sequence[float] = WINDOWS,
    order: str = "raster",
    *,
    weights: NDArray[Any] | None = None,
    emulate: bool = False,
    backend: Any = "quantcache",
) -> Plan:
    """Returns `plan` with what the heads of a model do; see `qc_compiler.calibration.calibrate`.

    Args:
        weights: Of `step_weights`; None measures them.
    """
    compiled = open_heads(module, plan, order, emulate, backend)
    return find_heads(compiled, generate, HeadSearch(budget, windows, weights), plan)


def open_heads(
    module: Any, plan: Plan, order: str = "raster", emulate: bool = False, backend: Any = "quantcache"
) -> Any:
    """Returns the compiled model with `plan`, and heads that wait to be told what to do."""
    blank = HeadPlan((), np.zeros((1, 1, 0, 0), dtype=np.float32), order)
    options = COMPUTE_ALL | {"plan": replace(plan, compensation=None, attention=blank), "emulate": emulate}
    return compile_static(module, backend, options)


def step_weights(compiled: Any, generate: Callable[[Any], Any]) -> NDArray[np.float64]:
    """Measures how much an error of the heads at each step counts in the end: (N,), with a mean of 1.

    Runs `generate` once in full and `PROBES` times with one step's heads cached.
    """
    full = Probe(0.0, ())
    reference = run_observed(compiled, generate, full)
    steps = sorted({step for _, step, _ in full.chosen})[1:]
    logs: dict[int, float] = {}
    for step in sorted({steps[round(at)] for at in np.linspace(0, len(steps) - 1, PROBES)} if steps else ()):
        probe = Probe(0.0, (), step=step)
        moved = float((run_observed(compiled, generate, probe) - reference).square().sum())
        if moved > 0 and sum(probe.errors) > 0:
            logs[step] = math.log(moved / float(np.mean(probe.errors)))
    if not logs:
        return np.ones(max(1, len(full.timesteps)))
    weights = np.exp(np.interp(np.arange(len(full.timesteps)), list(logs), list(logs.values())))
    return weights / weights[steps].mean()


def run_observed(compiled: Any, generate: Callable[[Any], Any], search: HeadSearch) -> Tensor:
    """Runs `generate` once, with every head as `search` has it; returns the samples."""
    with ops.observed(search.attend):
        return run_steered(compiled, generate, search)


def find_heads(compiled: Any, generate: Callable[[Any], Any], search: HeadSearch, plan: Plan) -> Plan:
    """Runs `generate` once, or so often as the weights of the steps need; returns `plan` with what the heads do.

    Args:
        compiled: The model, compiled with `plan` and heads that are left open.
        generate: As of `calibrate`.
        search: Holds the budget.
        plan: Its schedule and what it knows of linears are kept; a compensation would be stale.

    Raises:
        QuantCacheError: no attention of the model can be rewritten, or the plan's schedule is for other streams.
    """
    start = time.perf_counter()
    if search.weights is None:
        search.weights = step_weights(compiled, generate)
    run_observed(compiled, generate, search)
    runtime = runtime_of(compiled)
    layers = runtime.interface.layers if runtime.interface else []
    if not layers:
        skipped = [skip for run in runtime.reports if run.name == "rewrite-attention" for skip in run.report.skipped]
        why = "; ".join(f"{skip.where}: {skip.reason}" for skip in skipped[:3])
        raise QuantCacheError(f"no attention of this model can be head-wise: {why or 'it has none'}")
    order = runtime.options.plan.attention.order  # type: ignore[union-attr]
    streams = plan.streams if plan.has_schedule else tuple(dict.fromkeys(stream for stream, _, _ in search.chosen))
    timesteps = plan.timesteps if plan.has_schedule else tuple(search.timesteps)
    if unknown := [stream for stream, _, _ in search.chosen if stream not in streams]:
        raise QuantCacheError(
            f"generate(model) has a stream {unknown[0]!r}, the plan only {', '.join(streams)}: calibrate both with one "
            "generate"
        )
    measured = {
        "attention_saved": search.saved / search.total,
        "attention_minutes": (time.perf_counter() - start) / 60,
    }
    heads = search.plan([layer.name for layer in layers], streams, order)
    if plan.has_schedule:
        return replace(plan, attention=heads, measured=plan.measured | measured, compensation=None)
    return Plan.without_schedule(
        runtime.fingerprint,
        timesteps,
        streams,
        attention=heads,
        measured=plan.measured | measured,
        quantization=plan.quantization,
        pruned=plan.pruned,
        reasons=plan.reasons,
    )
