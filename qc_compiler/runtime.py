"""The only mutable state: where each trajectory stands, what its slots hold, what was decided.

A call of a compiled graph goes: locate (which trajectory, stream, step?) → decide (rule or plan) → call the pure
graph → commit. Nothing is committed before the graph returned, so a failure leaves the slots of the step before.

Everything is kept per thread, per explicit stream name and per layout of the slots; within a thread `trajectory.py`
tells the calls apart.
"""

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .compensation import compensate
from .controllers import Controller, History, PrecisionRule, Step, controller, precision_rule, pruning_rule
from .errors import OptionError, PlanError
from .extrapolation import polynomial_weights
from .graph import Interface
from .heads import Heads
from .options import Options, changed
from .plan import Plan
from .prepared import PreparedWeights, version_of
from .trajectory import Call, PendingStep, Position, StreamState, Trajectory, direction_of, locate

_STREAM: ContextVar[str | None] = ContextVar("quantcache_stream", default=None)

MAX_TRAJECTORIES = 64  # at a time, in one thread: streams named after requests would pile up otherwise
KEPT_TRAJECTORIES = 8  # whose decisions `summary` can still show


@contextlib.contextmanager
def stream(name: str) -> Iterator[None]:
    """Names the stream of the calls inside, e.g. "cond" and "uncond"; each name has slots of its own.

    Needed only where calls cannot be told apart by themselves: interleaved requests, or a conditional call that is
    sometimes left out.
    """
    token = _STREAM.set(name)
    try:
        yield
    finally:
        _STREAM.reset(token)


class Pilot:
    """What calibration steers a run by: it decides in place of the rule, and looks over the runtime's shoulder.

    Attributes:
        may_stray: Whether its samples may move further than a sampler takes them, and still be one run.
    """

    may_stray = False

    def decide(
        self, graph: "GuardedGraph", position: Position, state: StreamState, inputs: Sequence[Any], before: list[Tensor]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32] | None] | None:
        """Returns what a call computes, as `GuardedGraph._decide` does; None leaves it to the plan or the rule."""
        return None

    def observe(
        self, graph: "GuardedGraph", position: Position, timestep: float | None, inputs: Any, results: Any
    ) -> Any:
        """Takes one call of the model; returns what the user gets for its results."""
        return results


class Runtime:
    """The state of one model under one set of options; shared by all its graphs and threads."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.key: Any = ()  # by which the registry knows it
        self.reports: list[Any] = []
        self.interface: Interface | None = None
        self.notes: list[str] = []
        self.fingerprint = ""
        self.shared: Any = None  # the model's graph with shared blocks, before anything was added: for calibration
        self.prepared: dict[Any, PreparedWeights] = {}  # shared by the graphs of different shapes
        self.is_read = WeakIdKeyDictionary()  # parameter → whether anything that is left of any graph reads it
        self.trajectories: deque[Trajectory] = deque(maxlen=KEPT_TRAJECTORIES)
        self._lengths: dict[tuple[float, float], int] = {}  # of earlier trajectories, by their first two timesteps
        self.peak_slot_bytes = 0
        self.host_ms: deque[float] = deque(maxlen=512)  # time of a step outside the compiled graph
        self._lock = threading.Lock()
        self._local = threading.local()
        self._generation = 0
        self._warned: set[str] = set()
        self.pilot: Pilot | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any linear of the model is quantized."""
        return any(run.name == "lower-linears" and run.report.changed > 0 for run in self.reports)

    def configure(self, **changes: Any) -> None:
        with self._lock:
            options = changed(self.options, changes)
            if self.interface is not None:
                if options.plan is not None:
                    options.plan.check_model(self.fingerprint, self.interface.names, self.interface.fixed)
                if options.plan and options.plan.attention and self.interface.layers:
                    Heads(options.plan.attention, self.interface.layers)
                if options.has_probe and "probe" not in self.interface.names:
                    raise OptionError("cache='teacache' needs a new torch.compile: this graph has no probe for it")
            self.options = options

    def reset(self) -> None:
        """Forgets all trajectories and slots, in every thread, and what was prepared of the weights."""
        with self._lock:
            self._generation += 1
            self.trajectories.clear()
        self.forget_weights()

    def forget_weights(self) -> None:
        """Frees the prepared weights; the next call prepares them anew."""
        for weights in self.prepared.values():
            weights.clear()

    def warn_once(self, message: str) -> None:
        with self._lock:
            first = message not in self._warned
            self._warned.add(message)
        if first:
            warnings.warn(f"quantcache: {message}", stacklevel=3)

    def current(self, key: Any) -> Trajectory | None:
        local = self._local
        if getattr(local, "generation", None) != self._generation:
            local.generation, local.trajectories = self._generation, {}
        return local.trajectories.get(key)

    def begin(self, key: Any, trajectory: Trajectory) -> None:
        old = self.current(key)
        if old is not None and old.first is not None and old.second is not None and len(self._lengths) < 64:
            begins = (old.first, old.second)
            self._lengths[begins] = max(self._lengths.get(begins, 0), old.step + 1)
        for state in old.streams if old is not None else ():
            if not any(state is other for other in trajectory.streams):
                state.clear_slots()  # `summary` may keep the old one for long
        trajectories = self._local.trajectories
        trajectories.pop(key, None)
        trajectories[key] = trajectory
        if len(trajectories) > MAX_TRAJECTORIES:
            for state in trajectories.pop(next(iter(trajectories))).streams:
                state.clear_slots()
        with self._lock:
            self.trajectories.append(trajectory)

    def last_trajectories(self) -> list[Trajectory]:
        """Returns the last trajectory, of each named stream if streams have names."""
        with self._lock:
            return list({trajectory.name: trajectory for trajectory in self.trajectories}.values())

    def num_steps(self, first: float | None = None, second: float | None = None) -> int | None:
        """Returns the length of a trajectory: as the user or the plan says, or that of an earlier one begun alike."""
        plan = self.options.plan
        known = self.options.num_steps or (plan.num_steps if plan else None)
        return known or (self._lengths.get((first, second)) if first is not None and second is not None else None)


class GuardedGraph:
    """What the backend returns: a compiled pure graph and the state it is steered by.

    Args:
        interface: What the guard pass added.
        runtime: Of the model.
        clock: Index of the timestep among the inputs, or None.
        latent: Index of the model's main input.
        parameters: Indices of the parameters.
        symbols: For each symbolic size the index of its SymInt input.
        adopt: Is told the runtime and the parameters where they are others than at the last step.
    """

    def __init__(
        self,
        interface: Interface,
        runtime: Runtime,
        clock: int | None,
        latent: int | None,
        parameters: Sequence[int],
        symbols: dict[Any, int],
        adopt: Callable[[Runtime, Sequence[Any]], None] = lambda runtime, parameters: None,
    ) -> None:
        self.adopt = adopt
        self.compiled: Any = None  # see Interface
        self.interface, self.runtime = interface, runtime
        self.clock, self.latent, self.parameters, self.symbols = clock, latent, tuple(parameters), symbols
        self._known = {clock, latent, *parameters}
        self.names = interface.names
        self.output_region = self.names.index("output") if "output" in self.names else None
        self._speaking = [self._speaks_for(site.block) for site in interface.sites]
        self._prunable = np.array([region.prunable for region in interface.regions])
        self._least = [0 if region.prunable else 1 for region in interface.regions]  # residuals that reusing needs
        self._groups = np.array([region.group for region in interface.regions])
        self._floors: tuple[Any, NDArray[np.float32]] | None = None  # of the plan's noise, for our regions
        self._columns: tuple[Plan, list[int]] | None = None  # of our regions in the plan
        self._rule: tuple[Options, PrecisionRule] | None = None  # for precisions, under these options
        self._keeping = [layer for layer in interface.layers if layer.num_kept]
        self._heads: tuple[Any, Heads] | None = None  # of the plan, for our layers
        self._blanks: dict[Any, Tensor] = {}
        self._layouts: dict[tuple[int, ...], Any] = {}

    def __call__(self, *inputs: Any) -> Any:
        runtime, start = self.runtime, time.perf_counter()
        call, key = self._call(inputs), self._key(inputs)
        position, timestep = self._locate(key, call), call.timestep
        state = self._state(position)
        version, layout = self._parameters_version(inputs), self._layout(inputs)
        if (state.weights_version, state.layout) != (version, layout):
            state.clear_slots()
            self.adopt(runtime, [inputs[i] for i in self.parameters])
        if (position.step, position.turn) == (1, 0) and not call.is_given_what(state):
            for stream in position.trajectory.streams:  # they may be of a run that was given up in its first step
                stream.clear_slots()
        index = position.step
        coordinate = float(index) if timestep is None else timestep
        before = self._before(key, position)
        compute, weights, across = self._decide(state, position, coordinate, inputs, before)
        precision, heads, pruned = None, None, None
        correction = self._compensation(position, coordinate)
        if self.output_region is not None and not compute[self.output_region]:
            predicted = self._extrapolate_output(state, weights, across, before)
            results = self._corrected(predicted, correction, is_kept=across is not None)
            made = _Made([], [], [], 0.0)
        else:
            left_out = ~compute & ~weights.any(axis=1)
            pruned = left_out if left_out.any() else None
            precision = self._precision(state, position, coordinate)
            heads = self._modes(state, position, coordinate, inputs)
            results, made = self._run(inputs, state, compute, weights, heads, precision, correction)
            predicted = made.slots[self.output_region] if self.output_region is not None else []
        modes = None if heads is None else heads[0]
        self._commit(key, position, state, call, coordinate, compute, pruned, precision, modes, made)
        if across is not None:
            if compute.any():
                state.beside.appendleft(before)
            state.latest = predicted
        state.sample, state.weights_version, state.layout = call.sample, version, layout
        runtime.host_ms.append((time.perf_counter() - start - made.seconds) * 1e3)
        if runtime.pilot is not None:
            results = runtime.pilot.observe(self, position, timestep, inputs, results)
        return results

    # -- where are we? -----------------------------------------------------------------------------------------

    def _key(self, inputs: Sequence[Any]) -> Any:
        shape = tuple(inputs[self.latent].shape) if self.latent is not None else ()
        device = inputs[self.latent].device if self.latent is not None else None
        model = inputs[self.parameters[0]].data_ptr() if self.clock is None and self.parameters else 0
        return (_STREAM.get(), self.names, shape, device, self.interface.depth, model)

    def _call(self, inputs: Sequence[Any]) -> Call:
        timestep = None if self.clock is None else inputs[self.clock]
        strays = self.runtime.pilot is not None and self.runtime.pilot.may_stray
        latent = None if self.latent is None or strays else inputs[self.latent]
        others = (value for i, value in enumerate(inputs) if i not in self._known and isinstance(value, Tensor))
        return Call(timestep, latent, others)

    def _locate(self, key: Any, call: Call) -> Position:
        now = self.runtime.current(key)
        position = locate(now, call, self.runtime.num_steps())
        if position is None:
            return Position(Trajectory(key[0], num_steps=self.runtime.num_steps()), True, 0, 0)
        if position.step == 1 and call.timestep is not None:
            position.trajectory.num_steps = self.runtime.num_steps(position.trajectory.first, call.timestep)
        return position

    def _state(self, position: Position) -> StreamState:
        streams = position.trajectory.streams
        if position.turn < len(streams):
            return streams[position.turn]
        depth = self.interface.depth
        history: list[deque[Any]] = [deque(maxlen=depth) for _ in self.names]
        return StreamState(history=history, beside=deque(maxlen=depth), kept=[None] * len(self._keeping))

    def _before(self, key: Any, position: Position) -> list[Tensor]:
        """Returns what the call before this one predicted, if it was another stream's; else []."""
        plan, turn, streams = self.runtime.options.plan, position.turn, position.trajectory.streams
        if position.trajectory.name is None:
            other = streams[turn - 1] if turn or len(streams) > 1 else None
        elif plan is not None and len(plan.streams) > 1 and position.stream in plan.streams:
            turn = plan.streams.index(position.stream)
            named = self.runtime.current((plan.streams[turn - 1], *key[1:]))
            other = named.streams[0] if named else None
        else:
            other = None
        if other is None or other.steps[-1].index != position.step - (0 if turn else 1):
            return []
        return other.latest

    def _parameters_version(self, inputs: Sequence[Any]) -> int:
        return version_of([inputs[i] for i in self.parameters])

    # -- what to compute? --------------------------------------------------------------------------------------

    def _decide(
        self, state: StreamState, position: Position, coordinate: float, inputs: Sequence[Any], before: list[Tensor]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32] | None]:
        """Returns bool (R,), float32 (R, depth), and float32 (1 + depth,) if the plan mixes streams.

        A region that is not computed and has no weight is pruned.
        """
        self._drop_bad_slots(state)
        options, pilot = self.runtime.options, self.runtime.pilot
        decided = pilot.decide(self, position, state, inputs, before) if pilot is not None else None
        if decided is None:
            decided = self._by_plan(options.plan, position, coordinate) if options.plan and options.scheduled else None
        if decided is None:
            decided = self._by_rule(controller(options), state, position, coordinate)
        compute, weights, across = decided[0].copy(), decided[1], decided[2]
        rows = zip(self._least, state.history, weights.tolist())
        lacking = [len(slots) < max(least, _needed(row)) for least, slots, row in rows]
        if self.output_region is not None and not compute[self.output_region]:
            lacks_other = across is not None and _missing(across.tolist(), [before, *state.beside])
            compute[:] |= lacking[self.output_region] or lacks_other  # it was to be skipped as a whole
        compute = _agree(compute | lacking, options.process_group)
        if self.output_region is not None and not compute[self.output_region]:
            compute[:] = False  # nothing runs at all
        if options.prune is not None and pilot is None and compute.any():
            pruned = compute & self._redundant(state, position, coordinate)
            compute = _agree(compute & ~pruned, options.process_group)
            weights = np.where(pruned[:, None], 0, weights)
        return compute, weights, across

    def _history(self, state: StreamState, position: Position, coordinate: float) -> History:
        """Returns what a rule sees of a stream that has made a step."""
        steps, before = [step.resolve() for step in state.steps], [step.timestep for step in state.steps[-2:]]
        return History(steps, position.step, position.trajectory.num_steps, self.names, [*before, coordinate])

    def _redundant(self, state: StreamState, position: Position, coordinate: float) -> NDArray[np.bool_]:
        """Returns bool (R,): which regions the rule for pruning leaves out; none whose slot is to be filled."""
        if not state.steps:
            return np.zeros(len(self.names), dtype=np.bool_)
        history = self._history(state, position, coordinate)
        filled = np.array([bool(slots) for slots in state.history])
        return pruning_rule(self.runtime.options).decide(history) & self._prunable & filled

    def _by_plan(
        self, plan: Plan, position: Position, coordinate: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32] | None]:
        at = plan.index_of(position.stream), self._step_of(plan, position, coordinate)
        columns = self._columns_of(plan)
        across = None if plan.across is None else plan.across[at]
        return plan.compute[at][columns], plan.weights[at][columns], across

    def _columns_of(self, plan: Plan) -> list[int]:
        if self._columns is None or self._columns[0] is not plan:
            self._columns = plan, plan.columns(self.names)
        return self._columns[1]

    def _step_of(self, plan: Plan, position: Position, coordinate: float) -> int:
        step = plan.step_of(coordinate) if self.clock is not None else position.step
        if step >= plan.num_steps:
            raise PlanError(f"step {step + 1} of a plan for {plan.num_steps} steps: calibrate for more steps")
        first = position.trajectory.first
        if step > position.step and first is not None and step - plan.step_of(first) > position.step:
            raise PlanError(
                f"step {position.step + 1} has the timestep of step {step + 1} of the plan's {plan.num_steps}: this "
                "schedule has fewer steps; calibrate for it, or use plan.retimed([timesteps]) (to warm up, one step is "
                "enough, then qc_compiler.reset(model))"
            )
        return step

    def _by_rule(
        self, rule: Controller, state: StreamState, position: Position, coordinate: float
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32], None]:
        compute = np.ones(len(self.names), dtype=np.bool_)
        if state.steps:
            history = self._history(state, position, coordinate)
            steps = _carried(history.steps)
            if self.runtime.options.level.endswith("group"):
                steps = [_tied(step, self._groups) for step in steps]
            compute = rule.decide(replace(history, steps=steps))
        compute |= [not slots for slots in state.history]
        if "probe" in self.names:
            compute[self.names.index("probe")] = True
        weights = np.zeros((len(self.names), self.interface.depth), dtype=np.float32)
        for row, slots in zip(weights, state.history):
            known = [at for at, _ in slots]
            row[: len(known)] = polynomial_weights(known, coordinate)
        return compute, weights, None

    def _precision(self, state: StreamState, position: Position, coordinate: float) -> NDArray[np.int_] | None:
        """Returns int (S,), which of its precisions each site takes; None where there is no choice."""
        if not self.interface.sites:
            return None
        history = self._history(state, position, coordinate) if state.steps else None
        options = self.runtime.options
        if self._rule is None or self._rule[0] is not options:
            self._rule = options, precision_rule(options, self.interface.sites)
        choice = self._rule[1].decide(history, self._speaking, self._kept(options, position, coordinate))
        return _agree(choice, options.process_group)

    def _kept(self, options: Options, position: Position, coordinate: float) -> NDArray[np.bool_]:
        """Returns bool (R,): whether what is computed now will be reused; always, for all that a rule can say."""
        if options.plan is None or not options.scheduled:
            return np.full(len(self.names), options.cache != "off")
        plan, following = options.plan, self._step_of(options.plan, position, coordinate) + 1
        if following >= plan.num_steps:
            return np.zeros(len(self.names), dtype=np.bool_)
        return ~plan.compute[plan.index_of(position.stream), following][self._columns_of(plan)]

    def _floor(self, precision: NDArray[np.int_] | None) -> NDArray[np.float32] | None:
        """Returns float32 (R,): the change that quantization alone makes appear, at the lowest precision in use."""
        known = self.runtime.options.plan.quantization if self.runtime.options.plan else None
        if known is None or not known.regions or not self.runtime.quantizes:
            return None
        if self._floors is None or self._floors[0] is not known:
            at = [known.region_of(name) for name in self.names]
            self._floors = known, np.array([[0.0 if r is None else row[r] for r in at] for row in known.noise])
        floors = self._floors[1]
        if precision is None:
            return floors[0]
        lowest = np.full(len(self.names), precision.min())
        for region in set(self._speaking):
            lowest[region] = precision[np.equal(self._speaking, region)].min()
        return floors[lowest, np.arange(len(self.names))]

    def _modes(
        self, state: StreamState, position: Position, coordinate: float, inputs: Sequence[Any]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]] | None:
        """Returns `modes` and `attends`; None where attention is not head-wise."""
        plan, layers = self.runtime.options.plan, self.interface.layers
        if not layers:
            return None
        assert plan is not None
        assert plan.attention is not None
        if self._heads is None or self._heads[0] is not plan.attention:
            self._heads = plan.attention, Heads(plan.attention, layers)
        heads = self._heads[1]
        if state.rows is None or not np.array_equal(state.rows, heads.rows):  # kept under another plan: other heads
            state.rows, state.kept = heads.rows, [None] * len(self._keeping)
        present = iter([kept is not None for kept in state.kept])
        filled = [layer.num_kept > 0 and next(present) for layer in layers]
        tokens = [self._size(layer.shape[2], inputs) for layer in layers]
        stream = plan.index_of(position.stream)
        step = self._step_of(plan, position, coordinate) if plan.attention.layers else 0
        return heads.modes(stream, step, filled, tokens, asks=self.runtime.pilot is not None)

    def _compensation(self, position: Position, coordinate: float) -> NDArray[np.float32] | None:
        """Returns float32 (C, 2), shift and gain of each channel of the output; None where nothing is corrected."""
        plan = self.runtime.options.plan
        if plan is None or plan.compensation is None or self.interface.num_channels is None:
            return None
        if self.runtime.pilot is not None:
            return None
        return plan.compensation[plan.index_of(position.stream), self._step_of(plan, position, coordinate)]

    def _speaks_for(self, block: str) -> int:
        """Returns the region whose statistics speak for a block: the block itself, or its first sub-layer."""
        return next(r for r, name in enumerate(self.names) if name == block or name.startswith(f"{block}/"))

    def _holding(self, block: str) -> list[int]:
        """Returns the regions that must all be computed for a block to be."""
        return [r for r, name in enumerate(self.names) if name in ("network", block) or name.startswith(f"{block}/")]

    def _drop_bad_slots(self, state: StreamState) -> None:
        """Invariant 8: what NaN or Inf was seen in is not reused; the step is computed and the slots refilled."""
        if not state.steps or not state.steps[-1].computed.any():
            return
        step = state.steps[-1].resolve()
        bad = [self.names[r] for r in np.flatnonzero(~np.isfinite(step.statistics).all(axis=1))]
        if bad and any(state.history):
            state.clear_slots()
            self.runtime.warn_once(
                f"NaN or Inf in the statistics of {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}: "
                "its slots are dropped and the next step is computed in full"
            )

    # -- the step itself ---------------------------------------------------------------------------------------

    def _run(
        self,
        inputs: Sequence[Any],
        state: StreamState,
        compute: NDArray[np.bool_],
        weights: NDArray[np.float32],
        heads: tuple[NDArray[np.int32], NDArray[np.bool_]] | None,
        precision: NDArray[np.int_] | None,
        correction: NDArray[np.float32] | None,
    ) -> tuple[Any, "_Made"]:
        """Returns results of the model, and what else the graph returned."""
        slots: list[Tensor] = []
        for r, history in enumerate(state.history):
            blank = self._blank(r, inputs) if len(history) < self.interface.depth else []
            for age in range(self.interface.depth):
                slots += history[age][1] if age < len(history) else blank
        device = self.interface.slots[0].device
        steering = torch.from_numpy(weights).to(device, non_blocking=True)
        chosen: list[Tensor] = []
        if heads is not None:
            kept = [
                self._zeros(layer.shape, layer.dtype, layer.device, inputs) if old is None else old
                for layer, old in zip(self._keeping, state.kept)
            ]
            chosen = [*map(torch.from_numpy, heads), *kept]
        if precision is not None:
            chosen += [torch.from_numpy(precision[:, None] > np.arange(self.interface.num_choices - 1))]
        corrected: list[Tensor] = []
        if (channels := self.interface.num_channels) is not None:
            identity = np.tile(np.array([0, 1], dtype=np.float32), (channels, 1))
            corrected = [torch.from_numpy(identity if correction is None else correction).to(device, non_blocking=True)]
        start = time.perf_counter()
        produced = self.compiled(*inputs, *chosen, torch.from_numpy(compute), steering, *slots, *corrected)
        seconds = time.perf_counter() - start
        parts = iter(produced)
        results = [next(parts) for _ in range(self.interface.num_outputs)]
        kept_heads = [next(parts) for _ in self._keeping]
        rows = [next(parts) for _ in self.names]
        fresh: list[list[Tensor]] = [[] for _ in self.names]
        for slot in self.interface.slots:
            for _ in slot.shapes:
                fresh[slot.region].append(next(parts))
        num_bytes = self.interface.depth * sum(t.nbytes for tensors in fresh for t in tensors)
        num_bytes += sum(t.nbytes for t in kept_heads)
        self.runtime.peak_slot_bytes = max(self.runtime.peak_slot_bytes, num_bytes)
        return tuple(results), _Made(rows, fresh, kept_heads, seconds)

    def _extrapolate_output(
        self, state: StreamState, weights: NDArray[np.float32], across: NDArray[np.float32] | None, before: list[Tensor]
    ) -> list[Tensor]:
        """Returns Σⱼ wⱼ·sⱼ over this stream's last outputs, and over the stream before where a plan mixes them."""
        assert self.output_region is not None
        known = [tensors for _, tensors in state.history[self.output_region]]
        terms = list(zip(weights[self.output_region].tolist(), known))
        if across is not None:
            terms += [(w, tensors) for w, tensors in zip(across.tolist(), [before, *state.beside]) if w]
        results = []
        for k in range(len(known[0])):
            total = terms[0][0] * terms[0][1][k]
            for weight, tensors in terms[1:]:
                total = total.add(tensors[k], alpha=weight)
            results.append(total)
        return results

    def _corrected(
        self, predicted: list[Tensor], correction: NDArray[np.float32] | None, is_kept: bool
    ) -> tuple[Tensor, ...]:
        """Returns them for the caller, who may write to them: copies of what is kept; the first is corrected."""
        results = [tensor.clone() for tensor in predicted] if is_kept else list(predicted)
        if correction is not None:
            results[0] = compensate(results[0], torch.from_numpy(correction).to(results[0].device))
        return tuple(results)

    def _commit(
        self,
        key: Any,
        position: Position,
        state: StreamState,
        call: Call,
        coordinate: float,
        compute: NDArray[np.bool_],
        pruned: NDArray[np.bool_] | None,
        precision: NDArray[np.int_] | None,
        modes: NDArray[np.int32] | None,
        made: "_Made",
    ) -> None:
        trajectory, timestep = position.trajectory, call.timestep
        if position.is_new:
            self.runtime.begin(key, trajectory)
        if position.step > trajectory.step and trajectory.timestep is not None and timestep is not None:
            trajectory.direction = direction_of(trajectory.timestep, timestep)
        trajectory.timestep, trajectory.step, trajectory.turn = timestep, position.step, position.turn
        if position.step == 0:
            trajectory.first = timestep
        elif position.step == 1:
            trajectory.second = timestep
        if position.turn >= len(trajectory.streams):
            state.given = call.given
            trajectory.streams.append(state)
        floor = self._floor(precision) if compute.any() else None
        state.steps.append(PendingStep(position.step, timestep, compute, made.rows, precision, modes, floor, pruned))
        for r in np.flatnonzero(compute) if made.slots else ():
            if made.slots[r]:
                state.history[r].appendleft((coordinate, made.slots[r]))
        for i, (layer, heads) in enumerate(zip(self._keeping, made.kept)):
            if compute[self._holding(layer.block)].all():
                state.kept[i] = heads
        is_last = trajectory.num_steps == position.step + 1 and self.clock is not None
        if is_last and self.runtime.pilot is None:  # calibrated runs may be longer than those before
            state.clear_slots()  # the trajectory is over: give its memory back

    def _blank(self, region: int, inputs: Sequence[Any]) -> list[Tensor]:
        """Returns zeros that stand for a slot not filled yet; one tensor for all slots of a shape."""
        return [
            self._zeros(shape, dtype, slot.device, inputs)
            for slot in self.interface.slots
            if slot.region == region
            for shape, dtype in zip(slot.shapes, slot.dtypes)
        ]

    def _zeros(self, shape: Sequence[Any], dtype: torch.dtype, device: torch.device, inputs: Sequence[Any]) -> Tensor:
        kind = (tuple(self._size(n, inputs) for n in shape), dtype, device)
        if kind not in self._blanks:
            self._blanks[kind] = torch.zeros(kind[0], device=device).to(dtype)
        return self._blanks[kind]

    def _layout(self, inputs: Sequence[Any]) -> Any:
        """Returns what a slot must be like to serve this call (invariant 2): a prompt may be longer than the last."""
        sizes = tuple(int(inputs[i]) for i in self.symbols.values())
        if sizes not in self._layouts:
            self._layouts[sizes] = tuple(
                (slot.device, slot.dtypes, tuple(tuple(self._size(n, inputs) for n in shape) for shape in slot.shapes))
                for slot in self.interface.slots
            ) + tuple(
                (layer.device, layer.dtype, tuple(self._size(n, inputs) for n in layer.shape), layer.name)
                for layer in self._keeping
            )
        return self._layouts[sizes]

    def _size(self, number: Any, inputs: Sequence[Any]) -> int:
        if isinstance(number, int):
            return number
        values = {symbol: int(inputs[i]) for symbol, i in self.symbols.items()}
        return int(number.node.expr.xreplace(values))


@dataclass
class _Made:
    """What the graph returned beside the model's results.

    Attributes:
        rows: Sums of each region.
        slots: New slot values of each region.
        kept: New outputs of each layer's kept heads.
        seconds: Spent in the graph.
    """

    rows: list[Tensor]
    slots: list[list[Tensor]]
    kept: list[Tensor]
    seconds: float


def _needed(weights: list[float]) -> int:
    """Returns how many earlier residuals a row of weights reads."""
    return max((i + 1 for i, w in enumerate(weights) if w), default=0)


def _missing(weights: list[float], known: Sequence[list[Tensor]]) -> bool:
    """Whether a row of weights reads what is not known."""
    return any(i >= len(known) or not known[i] for i, w in enumerate(weights) if w)


def _carried(steps: Sequence[Step]) -> list[Step]:
    """Returns steps at which pruned regions count as computed, with the statistics they had when they last were."""
    if all(step.pruned is None for step in steps):
        return list(steps)
    seen, last = [], np.zeros_like(steps[0].statistics)
    for step in steps:
        if step.pruned is not None:
            rows = np.where(step.pruned[:, None], last, step.statistics)
            step = Step(step.index, step.computed | step.pruned, rows)
        last = np.where(step.computed[:, None], step.statistics, last)
        seen.append(step)
    return seen


def _tied(step: Step, groups: NDArray[np.int_]) -> Step:
    """Returns a step whose statistics are averaged over each group, so that a group decides as one."""
    rows = step.statistics.copy()
    for group in np.unique(groups):
        rows[groups == group] = rows[groups == group].mean(axis=0)
    return Step(step.index, step.computed, rows)


def _agree(wanted: NDArray[Any], group: Any) -> NDArray[Any]:
    """Invariant 9: what one rank of the group wants computed, or in high precision, is so on all of them."""
    if not group:
        return wanted
    import torch.distributed as dist

    ranks = None if group is True else group
    device = "cuda" if dist.get_backend(ranks) == "nccl" else "cpu"
    votes = torch.from_numpy(wanted.astype(np.int32)).to(device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=ranks)
    return votes.cpu().numpy().astype(wanted.dtype)
