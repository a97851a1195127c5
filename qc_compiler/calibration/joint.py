"""One plan for everything, under one error budget.

    choose      c calls to compute (of S·N), a scheme q of the linears, δ of the heads, p blocks to prune
    time        T = c·t·r_q·r_δ·r_p + (S·N − c)·t₀           t and t₀ of a computed and of a reused call, measured
    error       E² = e_c² + e_q² + e_δ² + e_p²               relative, the geometric mean of the samples'

so that T is least within an error, E is least within a time, or E is least within the bytes of the weights. The parts:

    r_q, r_δ    of a step's time, measured with everything computed and on a cached trajectory, where fewer heads can be
                stale, and interpolated (log–log) between; tried where `qc_compiler.cost`, which also gives r_p, says
                that it saves anything
    e_c         of the best schedule found for c calls, of samples that its weights are not fitted to; searched where
                the choice falls, interpolated (log–log) between, and falling to 0 where all calls are computed
    e_q, e_δ    of the samples, with everything computed and on a cached trajectory, where they may do far more harm;
                interpolated (log–log) between. A scheme may give each linear bits of its own (`importance`) or each
                step (`dmpq`), measured on the recorded trajectory
    e_p         Σ h_b² of the blocks b left out: how far the prediction moves where b alone is left out, on the recorded
                path, one block a call; the blocks that cost least error for their time come first

What is chosen is built: schedule, heads on the cached trajectory, linears on that, and last the weights of the skipped
steps, fitted anew on the compressed model, so that they also take back what the compression did. It is run. What came
out, or came out of samples that the weights were not fitted to, whichever is worse, counts for this choice from now on.
How many times E and T it is, is fitted by a factor for each lever to all that was built: heads save less on a cached
trajectory, where fewer of them can be stale. Then it is chosen again, with as much caution as the last prediction was
wrong, until the choice has been built already. Of several targets all but the last are planned once more in the end,
knowing what was built for the others.

A call is computed whole or not at all: giving one up for two of half of the blocks, as `find_schedule` tries, lowered
the error of no schedule of the image DiT that computes a tenth, a seventh or a fifth.

Source: ours. The interactions are those of Q&C (arXiv 2503.02508) and 6Bit-Diffusion (arXiv 2603.18742): noise in what
is cached counts as often as it is reused, which the factors measure.
"""

import contextlib
import functools
import itertools
import math
import re
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils import _pytree as pytree

from ..device_profile import clock
from ..errors import OptionError, QuantCacheError
from ..estimate import cost
from ..formats.schemes import SCHEMES, WEIGHTS, Scheme, recipe_of
from ..kernels import find_kernel
from ..plan import Plan, Quantization
from ..region_costs import Variant
from ..registry import runtime_of
from ..runtime import Pilot
from .attention import PROBES, calibrate_heads, open_heads, step_weights
from .importance import Measurement, measure
from .journal import Journal
from .recording import COMPUTE_ALL, Recording, by_sample, compile_static, first_call, forget_graphs, run_steered
from .removal import OneBlockLess
from .samples import Calls
from .schedule import DEPTH, Schedules, ScheduleSearch, relative_error
from .sites import SiteRunner

RECIPES = dict.fromkeys(("w8a8", "fp8", "nvfp4", "w4a8"), (0.0,)) | {  # with the mean bits to try
    "dmpq": (6.0,),
    "importance": (4.5, 5.0, 6.0),
}
SAMPLES = 8  # that the linears are measured on
OF_BITS = {  # a linear's scheme, by the bits of its weight
    bits: name for bits, weight in WEIGHTS.items() for name, s in SCHEMES.items() if s == Scheme(weight, "uint8")
}
DELTAS = (0.05, 0.2)  # of the heads
WORTH = 0.03  # part of a step's time that a lever must be able to save
SHARES = (0.08, 0.12, 0.2, 0.33, 0.5)  # where the error of a schedule is searched first
CACHED = 0.2  # share of the calls of the trajectory on which levers are measured beside the full one
LAPS = 3  # by which a lever is timed on it
EFFORT = 4  # generations for the search of a schedule
ROUNDS = 4  # of building and correcting
DOUBT = 0.3  # ridge of the factors of the levers: one plan alone is believed to three quarters
SAME = 0.05  # relative error of two runs that should be alike: kernels may round differently
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Target:
    """`kind` is `speedup` (against everything computed), `psnr` (dB) or `memory` (bytes of the weights)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def parse_target(text: Any) -> Target:
    """
    Raises:
        OptionError: it is none.

    >>> parse_target("psnr=35"), parse_target("memory=1.5GiB").value
    (Target(kind='psnr', value=35.0), 1610612736.0)
    """
    found = re.fullmatch(r"\s*(speedup|psnr|memory)\s*=\s*(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)?\s*", str(text))
    if not found or (found[3] and found[1] != "memory") or not float(found[2]) > 0:
        raise OptionError(f"target={text!r}: expected 'speedup=4', 'psnr=35' or 'memory=2GiB'")
    return Target(found[1], float(found[2]) * UNITS[found[3] or ""])


@dataclass(frozen=True)
class Choice:
    """What is decided.

    Attributes:
        calls: How many of the model's calls are computed, of all streams.
        quantize: Which of `Levers.quantizations` the linears have, or None.
        delta: The budget of the heads, or None.
        pruned: Names of blocks.
    """

    calls: int
    quantize: str | None = None
    delta: float | None = None
    pruned: tuple[str, ...] = ()

    @property
    def levers(self) -> tuple[Any, ...]:
        """What makes a plan with this choice other than its schedule alone."""
        return tuple(filter(None, (self.quantize, self.delta, "pruned" if self.pruned else None)))

    def __str__(self) -> str:
        parts = [f"{self.calls} calls", self.quantize, f"δ = {self.delta}" if self.delta else None]
        return ", ".join([part for part in parts if part] + [f"without {name}" for name in self.pruned])


@dataclass
class Levers:
    """What was measured of each lever: squared relative errors, and its time over that of the full model."""

    schemes: dict[str | None, float] = field(default_factory=lambda: {None: 0.0})
    quantizations: dict[str, Quantization] = field(default_factory=dict, compare=False)
    deltas: dict[float | None, float] = field(default_factory=lambda: {None: 0.0})
    cached: dict[str | float | None, tuple[int, float, float]] = field(default_factory=dict)  # calls, and both there
    ratios: dict[str | float | None, float] = field(default_factory=lambda: {None: 1.0}, compare=False)
    prunable: list[tuple[str, float]] = field(default_factory=list)  # in the order in which blocks are left out
    fast: set[str] = field(default_factory=set)  # schemes that save time here
    reasons: list[str] = field(default_factory=list)


class JointPlanner:
    """Measures a model on `generate` and plans for targets; each measurement serves all of them."""

    def __init__(
        self,
        model: Any,
        generate: Callable[[Any], Any],
        *,
        data_range: float | None = None,
        max_generations: float = 100.0,
        resume: str | Path | None = None,
        progress: bool = True,
        backend: Any = "quantcache",
    ) -> None:
        """
        Args:
            model: Plain or compiled.
            generate: As of `calibrate`.
            data_range: What a PSNR is relative to; None takes the range of the samples.
            max_generations: After so many full generations nothing new is tried. What runs is finished, and a target
                that no plan meets yet still gets up to four.
            resume: A file that remembers what was measured, to go on after an interruption.
            progress: Show a progress bar.
            backend: As of `calibrate`.
        """
        self.module, self.generate, self.backend = getattr(model, "_orig_mod", model), generate, backend
        self.max_generations, self.data_range = max_generations, data_range
        self._journal = Journal(resume)
        self._progress = Progress(
            *Progress.get_default_columns()[:3], TimeRemainingColumn(), TextColumn("{task.fields[spent]}"),
            disable=not progress, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("recording", total=max_generations, spent="")
        self._schedules: dict[int, tuple[float, Schedules, float]] = {}  # calls → error, schedules, gain
        self._built: dict[Choice, Plan] = {}
        self._left: dict[tuple[str, ...], float] = {}  # of a call's time without these blocks
        self._learned: dict[Any, NDArray[np.float64]] = {}  # lever → logarithms of the factors of error and time
        self._caution = np.zeros(2)  # likewise, of all that was not built, while one target is planned

    def plans(self, targets: Sequence[Target]) -> list[Plan]:
        """Returns a plan for each target, in their order."""
        try:
            with self._progress, torch._dynamo.config.patch(recompile_limit=1000):  # a graph for each compression
                self._measure({target.kind for target in targets})
                for target in targets:
                    if target.kind == "memory":
                        self._choose(target)  # raises what cannot be, before anything is built
                for target in [*targets, *targets[:-1]]:
                    self._build_for(target)
                return [self._best(target) or self._nearest(target) for target in targets]
        finally:
            forget_graphs(self.module)

    # -- what is measured once

    def _measure(self, kinds: Collection[str]) -> None:
        args, kwargs = first_call(self.module, self.generate)
        batch = next(x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 1)
        self._num_pairs = math.ceil(SAMPLES / batch)
        self.device = next(self.module.parameters()).device
        self._now = clock(self.device)
        self.recording, compiled = Recording(), self._compiled()
        self.reference = self._run("recording", compiled, self.recording)
        if self.data_range is None and self.reference.min() == self.reference.max():
            value = float(self.reference.min())
            raise QuantCacheError(f"generate(model) returned nothing but {value:g}: a PSNR needs data_range=… then")
        if self.recording.num_steps < 2:
            raise QuantCacheError("generate(model) took 1 step of the model: expected 2 or more, 3 for a schedule")
        self.recording.check()
        self.num_calls = self.recording.num_steps * len(self.recording.outputs)
        if not (noise := self._error(self._samples("the same once more", compiled))) < SAME:
            raise QuantCacheError(
                f"generate(model) returned other samples when called again (relative error {noise:.2g}): fix its seed; "
                "if it did, they are not finite"
            )
        full_seconds = self._lap(compiled)
        runtime_of(compiled).configure(interval=10**6)
        self._lap(compiled, share=1 / self.recording.num_steps)  # compiles
        rest_seconds = self._lap(compiled, share=1 / self.recording.num_steps)
        runtime_of(compiled).configure(interval=1)
        self._full = compiled
        num_first = len(self.recording.outputs)
        host = max(0.0, (rest_seconds - full_seconds * num_first / self.num_calls) / (self.num_calls - num_first))
        self.full_seconds = full_seconds
        estimate = cost(self.module, *args, dynamic=False, **kwargs)
        self.estimate = estimate.anchored(full_seconds / self.num_calls, host_seconds=host)
        self.fingerprint = runtime_of(compiled).fingerprint
        self._journal.open(f"{self.fingerprint} {self.data_range}", self.reference)
        self.levers = Levers()
        if set(kinds) != {"memory"}:
            for share in SHARES:
                if not self._schedules or not self._is_over:
                    self._schedule(num_first * max(2, round(share * self.recording.num_steps)))
        self._measure_blocks()
        self._measure_schemes("memory" in kinds)
        if set(kinds) != {"memory"}:
            self._measure_heads()
            self._measure_cached()

    def _measure_schemes(self, needs_memory: bool) -> None:
        for scheme in filter(SCHEMES.__contains__, RECIPES):
            gain = 1 - self.estimate.step_seconds(default=Variant(quantize=scheme)) / self.estimate.step_seconds()
            if gain >= WORTH:
                self.levers.fast.add(scheme)
            else:
                self.levers.reasons.append(f"{scheme}: it saves {max(gain, 0):.0%} of a step on this device")
        self._sites = SiteRunner(runtime_of(self._full).shared)
        generations = 4 * len(self._sites.sites) * self._num_pairs / self.num_calls  # two formats, at two steps each
        for recipe, all_bits in RECIPES.items():
            is_fast = self._is_fast(recipe)
            if recipe not in SCHEMES and generations > self.max_generations / 3:
                self.levers.reasons.append(f"{recipe}: measuring its linears takes {generations:.0f} generations")
                continue
            for bits in all_bits if needs_memory or is_fast else ():
                scheme = f"{recipe} with {bits} bits" if len(all_bits) > 1 else recipe
                if self._is_over:
                    self.levers.reasons.append(f"{scheme}: {self.max_generations:.0f} generations were over")
                    continue
                if is_fast:
                    self.levers.fast.add(scheme)
                plan = self._journal.plan(f"linears: {scheme}", lambda: self._quantized(scheme, recipe, bits))  # noqa: B023
                self.levers.schemes[scheme] = plan.measured["error"] ** 2
                assert plan.quantization is not None
                self.levers.quantizations[scheme] = plan.quantization
                self.levers.ratios[scheme] = plan.measured["ratio"]
                if is_fast and plan.measured["ratio"] > 1 - WORTH:
                    self.levers.fast.discard(scheme)
                    self.levers.reasons.append(f"{scheme}: a step takes {plan.measured['ratio']:.0%} of its time")
        self.__dict__.pop("_linears", None)  # it holds activations of all blocks
        self._keep_the_best()

    def _keep_the_best(self) -> None:
        """Drops schemes where another one is as fast and as precise."""
        known = {name: (noise, self.levers.ratios[name]) for name, noise in self.levers.schemes.items() if name}
        for name, figures in known.items():
            others = (other for other in known if other != name and {name, other} <= self.levers.fast)
            if better := next((o for o in others if all(np.less_equal(known[o], figures))), None):
                self.levers.fast.discard(name)
                self.levers.reasons.append(f"{name}: it is neither faster nor more precise than {better}")

    def _is_fast(self, recipe: str) -> bool:
        """Whether this device has a kernel for all that a recipe may choose, and one of them saves time."""
        how = recipe_of(recipe)
        schemes = [SCHEMES[name] for name in OF_BITS.values()] if how.allocated else how.schemes
        return _narrowest(recipe) in self.levers.fast and all(find_kernel(s, self.device) is not None for s in schemes)

    def _quantized(self, scheme: str, recipe: str, bits: float) -> Plan:
        """Returns a plan that quantizes and does nothing else, with its error."""
        if recipe in SCHEMES:
            quantization = Quantization.of(recipe, [site.name for site in self._sites.sites])
        else:
            before = self._linears.num_calls
            quantization = measure(self._linears, recipe, bits)
            self._spend((self._linears.num_calls - before) / self.num_calls, f"the linears in {scheme}")
        plan = replace(Plan.without_schedule(""), quantization=quantization)
        compiled = self._compiled(plan=plan, emulate=scheme not in self.levers.fast)
        error, ratio = self._alone(compiled, scheme)
        return replace(plan, measured={"error": error, "ratio": ratio})

    @functools.cached_property
    def _linears(self) -> Measurement:
        calls = Calls()
        self._run("the inputs of the linears", self._full, calls)
        return Measurement(self._sites, calls.pairs("tap", SAMPLES))

    def _measure_heads(self) -> None:
        plain = self.estimate.step_seconds()
        gain = 1 - self.estimate.step_seconds(default=Variant(attended=0.5)) / plain
        if gain < WORTH:
            self.levers.reasons.append(f"heads: half of all attention is {max(gain, 0):.0%} of a step")
            return
        for delta in DELTAS:
            if self._is_over:
                self.levers.reasons.append(f"heads: {self.max_generations:.0f} generations were over")
                return
            try:
                error, ratio = self._journal.get(f"heads, δ = {delta}", lambda: self._heads_alone(delta))  # noqa: B023
            except QuantCacheError as why:
                self.levers.reasons.append(f"heads: {why}")
                return
            if ratio > 1 - WORTH:
                self.levers.reasons.append(f"heads within δ = {delta}: a step takes {ratio:.0%} of its time")
            else:
                self.levers.deltas[delta], self.levers.ratios[delta] = error**2, ratio

    def _measure_cached(self) -> None:
        """Measures what each lever adds to the error of a schedule, refitted to it, and the time of its calls there."""
        if not self._errors:
            return
        calls = min(self._errors, key=lambda calls: abs(calls - CACHED * self.num_calls))
        bare = self._errors[calls]
        nothing = Plan.without_schedule(self.fingerprint)
        alone = functools.cache(lambda: self._running(self._scheduled(Choice(calls), nothing, judged=False)))
        compressed = [Choice(calls, quantize=scheme) for scheme in self.levers.schemes if scheme in self.levers.fast]
        compressed += [Choice(calls, delta=delta) for delta in self.levers.deltas if delta is not None]
        for choice in compressed:
            if self._is_over:
                break
            error, ratio = self._journal.get(f"cached: {choice}", lambda: self._on_cached(choice, alone()))  # noqa: B023
            (lever,) = choice.levers
            self.levers.cached[lever] = calls, error**2 - bare**2, ratio

    def _on_cached(self, choice: Choice, alone: Any) -> tuple[float, float]:
        """Returns the error of a choice, and the time of its computed calls over that of its schedule alone."""
        plan, share = self._composed(choice), choice.calls / self.num_calls
        with _freed(self._running(plan)) as compiled:
            laps = [(self._lap(compiled, share), self._lap(alone, share)) for _ in range(1 + LAPS)]
        idle = (self.num_calls - choice.calls) * self.estimate.host_seconds
        ratios = [max(ours - idle, 1e-9) / max(plain - idle, 1e-9) for ours, plain in laps[1:]]  # the first compiles
        return plan.measured["error"], statistics.median(ratios)

    def _heads_alone(self, delta: float) -> tuple[float, float]:
        plan = self._with_heads(Plan.without_schedule(""), delta)
        return self._alone(self._compiled(plan=plan), f"heads, δ = {delta}")

    def _alone(self, compiled: Any, what: str) -> tuple[float, float]:
        """Returns the error of a lever with everything computed, and the time of its calls over the full model's."""
        with _freed(compiled):
            samples, ratio = self._beside_full(compiled, f"{what} alone")
        return self._error(samples), ratio

    def _beside_full(self, compiled: Any, what: str) -> tuple[Tensor, float]:
        """Returns the samples of a model that computes everything, and the time of its calls over the full model's.

        Each call is made to both, so that whatever else the machine does happens to both; the median counts.
        """
        ratios: list[float] = []
        full_seconds = begun = 0.0

        def before(_: Any, args: Any, kwargs: Any) -> None:
            nonlocal full_seconds, begun
            start = self._time()
            self._full(*args, **kwargs)
            begun = self._time()
            full_seconds = begun - start

        def after(*_: Any) -> None:
            ratios.append((self._time() - begun) / full_seconds)

        handles = compiled.register_forward_pre_hook(before, with_kwargs=True), compiled.register_forward_hook(after)
        try:
            samples = self._samples(what, compiled, share=2.0)
        finally:
            for handle in handles:
                handle.remove()
        return samples, statistics.median(ratios)

    def _measure_blocks(self) -> None:
        def run() -> dict[str, float]:
            pilot, compiled = OneBlockLess(self.recording), self._compiled(level="output+block")
            self._run("one block less", compiled, pilot)
            while not pilot.is_done:
                self._run("one block less", compiled, pilot)
            return pilot.harms()

        seconds = {block.name: self.estimate.seconds(block.name) for block in self.estimate.blocks}
        harms = {name: harm for name, harm in self._journal.get("blocks", run).items() if name in seconds}
        ranked = sorted(harms, key=lambda name: harms[name] ** 2 / max(seconds[name], 1e-9))
        self.levers.prunable = [(name, harms[name] ** 2) for name in ranked[: len(ranked) // 2]]

    # -- what is searched where the choice falls

    def _schedule(self, calls: int) -> tuple[float, Schedules, float]:
        """Returns the error of the best schedule found for this many calls, the schedule, and its gain.

        The error is infinite where every schedule that was tried ends in NaN or Inf.
        """
        if calls not in self._schedules:
            error, schedules, gain = self._journal.get(f"{calls} calls", lambda: self._find(calls))
            self._schedules[calls] = error, _as_tuples(schedules), gain
        return self._schedules[calls]

    def _find(self, calls: int) -> tuple[float, Schedules, float]:
        search = self._search(self._compiled(), calls)
        num_candidates = max(10, round(EFFORT * self.num_calls / calls))
        best = search.find(calls // len(self.recording.outputs), num_candidates)
        error, _ = search.measure(best, search.gain)
        return search.plan(best).measured["error"] if math.isfinite(error) else math.inf, best, search.gain

    def _search(self, compiled: Any, calls: int) -> ScheduleSearch:
        share = calls / self.num_calls
        return ScheduleSearch(
            compiled, self.generate, self.recording, self.reference, tell=lambda text: self._spend(share, text)
        )

    @property
    def _errors(self) -> dict[int, float]:
        """The errors of the schedules that were found, by their calls, in order; without those that are infinite."""
        errors = {calls: error for calls, (error, _, _) in sorted(self._schedules.items())}
        return {calls: error for calls, error in errors.items() if math.isfinite(error)}

    def _schedule_error(self, calls: int) -> float:
        if calls >= self.num_calls:
            return 0.0
        finite = self._errors
        if not finite or calls <= max(self._schedules.keys() - finite.keys(), default=0):
            return math.inf
        known, errors = list(finite), [max(error, 1e-12) for error in finite.values()]
        if calls > known[-1]:  # to nothing where all are computed
            return errors[-1] * (self.num_calls - calls) / (self.num_calls - known[-1])
        if calls < known[0] and len(known) > 1:
            slope = math.log(errors[1] / errors[0]) / math.log(known[1] / known[0])
            return errors[0] * (calls / known[0]) ** min(slope, 0.0)
        return _between(calls, known, errors)

    # -- the choice

    def _predict(self, choice: Choice) -> tuple[float, float]:
        """Returns error and speed-up."""
        if choice in self._built and not self._is_emulated(choice):
            return self._built[choice].measured["error"], self._built[choice].measured["speedup"]
        error, speedup = self._by_parts(choice)
        if not choice.levers:
            return error, speedup
        more = sum((self._learned[lever] for lever in choice.levers if lever in self._learned), start=self._caution)
        return error * math.exp(more[0]), speedup / math.exp(more[1])

    def _by_parts(self, choice: Choice) -> tuple[float, float]:
        """Returns error and speed-up as if no lever changed what another does."""
        removed = dict(self.levers.prunable)
        noise = self._noise(choice.quantize, self.levers.schemes[choice.quantize], choice.calls)
        noise += self._noise(choice.delta, self.levers.deltas[choice.delta], choice.calls)
        noise += sum(removed[name] for name in choice.pruned)
        idle = (self.num_calls - choice.calls) * self.estimate.host_seconds
        seconds = choice.calls * self._call_seconds(choice) + idle
        return math.sqrt(self._schedule_error(choice.calls) ** 2 + noise), self.full_seconds / seconds

    def _noise(self, lever: str | float | None, alone: float, calls: int) -> float:
        """Returns the squared error that a lever adds where so many calls are computed, of that where all are."""
        at, cached, _ = self.levers.cached.get(lever, (1, 0.0, 1.0))
        if cached <= alone or calls == self.num_calls:
            return alone
        return _between(calls, (at, self.num_calls), (cached, max(alone, 1e-24)))

    def _call_seconds(self, choice: Choice) -> float:
        """Returns the predicted time of a computed call."""
        if choice.pruned not in self._left:
            pruned = {name: Variant("pruned") for name in choice.pruned}
            self._left[choice.pruned] = self.estimate.step_seconds(pruned) / self.estimate.step_seconds()
        ratio = math.prod(self._ratio(lever, choice.calls) for lever in (choice.quantize, choice.delta))
        return ratio * self._left[choice.pruned] * self.full_seconds / self.num_calls

    def _ratio(self, lever: str | float | None, calls: int) -> float:
        """Returns how much of a call's time a lever leaves where so many calls are computed."""
        alone = self.levers.ratios[lever]
        at, _, cached = self.levers.cached.get(lever, (1, 0.0, alone))
        return _between(calls, (at, self.num_calls), (cached, alone)) if at < self.num_calls else alone

    def _formats(self, choice: Choice) -> str | dict[str, str] | None:
        """Returns the formats of the linears, as `Variant` takes them."""
        if choice.quantize is None:
            return None
        known = self.levers.quantizations[choice.quantize]
        if not recipe_of(known.recipe).allocated:
            return _narrowest(known.recipe)
        return {site: OF_BITS[bits] for site, bits in zip(known.sites, known.bits.tolist()) if bits in OF_BITS}

    def _choose(self, target: Target) -> Choice:
        """Returns the best of all choices, as predicted: they are few enough to look at each."""
        names = [name for name, _ in self.levers.prunable]
        left_out = [tuple(names[:count]) for count in range(len(names) + 1)]
        if target.kind == "memory":
            smaller = itertools.product([self.num_calls], self.levers.schemes, [None], left_out)
            sizes = {choice: self._weight_bytes(choice) for choice in itertools.starmap(Choice, smaller)}
            fine = [choice for choice, size in sizes.items() if size <= target.value]
            if not fine:
                tried = f" of what max_generations={self.max_generations:g} left to try" if self._is_over else ""
                least = f"the least{tried} is {min(sizes.values()):.0f}"
                raise OptionError(f"target memory={target.value:.0f} bytes: {least}")
            return min(fine, key=lambda c: self._predict(c)[0])
        schemes = [scheme for scheme in self.levers.schemes if scheme is None or scheme in self.levers.fast]
        num_streams = len(self.recording.outputs)
        all_calls = range(2 * num_streams, self.num_calls + 1, num_streams)
        choices = itertools.starmap(Choice, itertools.product(all_calls, schemes, self.levers.deltas, left_out))
        predicted = {c: figures for c in choices if math.isfinite((figures := self._predict(c))[0])}
        if target.kind == "psnr":
            fine = [c for c in predicted if self._psnr(predicted[c][0]) >= target.value] or [Choice(self.num_calls)]
            return max(fine, key=lambda c: self._predict(c)[1])
        fine = [c for c in predicted if predicted[c][1] >= target.value]
        fine = fine or [max(predicted, key=lambda c: predicted[c][1])]
        return min(fine, key=lambda c: predicted[c][0])

    def _weight_bytes(self, choice: Choice) -> float:
        total, formats = float(self.estimate.cost("outside").weight_bytes), self._formats(choice)
        for block in self.estimate.blocks:
            state = "pruned" if block.name in choice.pruned else "computed"
            total += float(block.cost(Variant(state, quantize=formats)).weight_bytes)
        return total

    # -- what is built

    def _build_for(self, target: Target) -> None:
        """Builds what is best for a target, corrects the predictions by it, and chooses again until that was built."""
        self._caution = np.zeros(2)
        for _ in range(ROUNDS):
            choice = self._settled(target)
            if choice in self._built or (self._is_over and self._best(target) is not None):
                break
            promised = self._predict(choice)
            self._built[choice] = self._journal.plan(f"plan: {choice}", lambda: self._build(choice))  # noqa: B023
            self._caution = np.maximum(self._caution, _beyond(self._predict(choice), promised))
            self._learn()

    def _settled(self, target: Target) -> Choice:
        """Returns the choice once it rests on a schedule that was searched for, not on errors between others'."""
        choice = self._choose(target)
        for _ in range(ROUNDS):
            if choice.calls in (self.num_calls, *self._schedules) or self._is_over:
                break
            self._schedule(choice.calls)
            choice = self._choose(target)
        return choice

    def _best(self, target: Target) -> Plan | None:
        """Returns the best of the plans that were built and meet a target."""
        if target.kind == "memory":
            built = {c: p for c, p in self._built.items() if self._weight_bytes(c) <= target.value}
            return min(built.values(), key=lambda plan: plan.measured["error"], default=None)
        good = [plan for plan in self._built.values() if plan.measured[target.kind] >= target.value]
        wanted = "speedup" if target.kind == "psnr" else "psnr"
        return max(good, key=lambda plan: plan.measured[wanted], default=None)

    def _nearest(self, target: Target) -> Plan:
        """Returns the plan that comes nearest to a target that none meets."""
        best = max(self._built.values(), key=lambda plan: plan.measured[target.kind])
        missed = f"target {target} was not reached: {best.measured[target.kind]:.4g} is the most of what was built"
        warnings.warn(f"quantcache: {missed}", stacklevel=2)
        return replace(best, reasons=(*best.reasons, missed))

    def _composed(self, choice: Choice) -> Plan:
        plan = Plan.without_schedule(self.fingerprint, pruned=choice.pruned)
        if choice.delta is not None:
            plan = self._with_heads(self._scheduled(choice, plan, judged=False), choice.delta)
        plan = replace(plan, quantization=self.levers.quantizations.get(choice.quantize or ""))
        return self._scheduled(choice, plan)

    def _build(self, choice: Choice) -> Plan:
        plan, share = self._composed(choice), choice.calls / self.num_calls
        with _freed(self._running(plan, emulate=self._is_emulated(choice))) as compiled:
            own = self._error(self._samples("checking the plan", compiled, share))
            speedup = self._speedup(compiled, share)
        error = max(own, plan.measured.get("error", 0.0))  # the kernels that users run may round away from the fit's
        measured = {"share": share, "error": error, "psnr": self._psnr(error), "speedup": speedup}
        predicted = self._predict(choice)
        measured |= {"predicted_psnr": self._psnr(predicted[0]), "predicted_speedup": predicted[1]}
        measured["generations"] = self.generations
        return replace(plan, measured=plan.measured | measured, reasons=tuple(self._reasons(choice)))

    def _scheduled(self, choice: Choice, plan: Plan, *, judged: bool = True) -> Plan:
        """Returns the plan with the schedule of the choice, whose weights are fitted to what the plan compresses."""
        if choice.calls == self.num_calls:
            return self._everything.compressed_like(plan)
        bare = Plan.without_schedule("", plan.timesteps, plan.streams).compressed_like(plan)
        _, schedules, gain = self._schedule(choice.calls)
        with _freed(self._compiled(plan=bare, emulate=self._is_emulated(choice))) as compiled:
            search = self._search(compiled, choice.calls)
            search.gain = gain
            return search.plan(schedules, judged=judged).compressed_like(plan)

    @property
    def _everything(self) -> Plan:
        """The schedule that computes every call: without one the option `cache` would decide what is reused."""
        streams, timesteps = tuple(self.recording.outputs), tuple(self.recording.timesteps)
        compute = np.ones((len(streams), len(timesteps), 1), dtype=np.bool_)
        unread = np.zeros((*compute.shape, 1), dtype=np.float32)
        return Plan(self.fingerprint, "output", ("output",), timesteps, compute, unread, streams)

    def _is_emulated(self, choice: Choice) -> bool:
        return choice.quantize is not None and choice.quantize not in self.levers.fast

    def _reasons(self, choice: Choice) -> Iterator[str]:
        """Yields what was decided, what each decision changed otherwise would bring, and what was no lever here."""

        def told(instead: Choice) -> str:
            error, speedup = self._predict(instead)
            return f"{speedup:.2f}× at {self._psnr(error):.1f} dB predicted"

        yield str(choice)
        yield f"so: {told(choice)}"
        num_streams = len(self.recording.outputs)
        for calls in (choice.calls - num_streams, choice.calls + num_streams) if self._schedules else ():
            if 2 * num_streams <= calls <= self.num_calls:
                yield f"with {calls} calls: {told(replace(choice, calls=calls))}"
        for scheme in self.levers.schemes:
            if scheme != choice.quantize:
                yield f"with {scheme or 'linears as they are'}: {told(replace(choice, quantize=scheme))}"
        for delta in self.levers.deltas:
            if delta != choice.delta:
                heads = f"heads within δ = {delta}" if delta else "full heads"
                yield f"with {heads}: {told(replace(choice, delta=delta))}"
        names = [name for name, _ in self.levers.prunable]
        for count in (len(choice.pruned) - 1, len(choice.pruned) + 1):
            if 0 <= count <= len(names):
                changed = set(choice.pruned) ^ set(names[:count])
                verb = "without" if count > len(choice.pruned) else "with"
                yield f"{verb} {', '.join(changed)}: {told(replace(choice, pruned=tuple(names[:count])))}"
        yield from self.levers.reasons

    def _learn(self) -> None:
        """Fits what each lever does to the error and the time of a plan beyond its part, to all that runs here."""
        built = [choice for choice in self._built if not self._is_emulated(choice)]
        levers = list(dict.fromkeys(lever for choice in built for lever in choice.levers))
        if not levers:
            return
        rows = np.array([[lever in choice.levers for lever in levers] for choice in built], dtype=np.float64)
        beyond = np.array([_beyond(self._predict(choice), self._by_parts(choice)) for choice in built])
        fitted = np.linalg.solve(rows.T @ rows + DOUBT * np.eye(len(levers)), rows.T @ beyond)
        self._learned = dict(zip(levers, fitted))

    def _with_heads(self, plan: Plan, delta: float) -> Plan:
        weights = np.array(self._journal.get("weights of the steps", self._weigh_steps))
        self._spend(1.0, f"heads, δ = {delta}")
        return calibrate_heads(self.module, self.generate, plan, delta, weights=weights, backend=self.backend)

    def _weigh_steps(self) -> list[float]:
        self._spend(1.0 + PROBES, "the weights of the steps")
        compiled = open_heads(self.module, Plan.without_schedule(""), backend=self.backend)
        return step_weights(compiled, self.generate).tolist()

    # -- runs

    def _compiled(self, **options: Any) -> Any:
        options = COMPUTE_ALL | {"cache_order": DEPTH - 1} | options
        return compile_static(self.module, self.backend, options)

    def _running(self, plan: Plan, *, emulate: bool = False) -> Any:
        """Returns the model as its user runs it with a plan."""
        return compile_static(self.module, self.backend, {"strict": True, "plan": plan, "emulate": emulate})

    def _run(self, what: str, compiled: Any, pilot: Pilot) -> Tensor:
        result = run_steered(compiled, self.generate, pilot)
        self._spend(1.0, what)
        return result

    def _samples(self, what: str, compiled: Any, share: float = 1.0) -> Tensor:
        self._spend(share, what)
        return by_sample(self.generate(compiled))

    def _speedup(self, compiled: Any, share: float) -> float:
        """Returns how many times as fast as the full model it is, that has run: by a lap of that and as long of its."""
        full, laps = self._lap(self._full), [self._lap(compiled, share)]
        while sum(laps) < full:
            laps.append(self._lap(compiled, share))
        return full / statistics.median(laps)

    def _lap(self, compiled: Any, share: float = 1.0) -> float:
        start = self._time()
        self.generate(compiled)
        seconds = self._time() - start
        self._spend(share, "timing")
        return seconds

    def _time(self) -> float:
        """Returns the seconds of the clock, after all that the device was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._now()

    def _spend(self, share: float, what: str) -> None:
        self._journal.generations += share
        self._progress.update(
            self._task, completed=self.generations, description=what, spent=f"{self.generations:.1f} generations"
        )

    @property
    def generations(self) -> float:
        """What was spent so far, in full generations, and before an interruption."""
        return self._journal.generations

    @property
    def _is_over(self) -> bool:
        """Whether nothing new may be tried."""
        return self.generations > self.max_generations

    def _error(self, samples: Tensor) -> float:
        return relative_error(samples, self.reference)

    def _psnr(self, error: float) -> float:
        spread = self.data_range or float(self.reference.max() - self.reference.min())
        mean_square = (error * float(self.reference.norm())) ** 2 / self.reference.numel()
        if mean_square == 0:
            return math.inf
        return 10 * math.log10(spread**2 / mean_square) if math.isfinite(mean_square) else -math.inf


@contextlib.contextmanager
def _freed(compiled: Any) -> Iterator[Any]:
    """Frees in the end what a compiled model prepared: Dynamo keeps its graph, and that a copy of all weights."""
    try:
        yield compiled
    finally:
        runtime_of(compiled).reset()


def _beyond(found: tuple[float, float], expected: tuple[float, float]) -> NDArray[np.float64]:
    """Returns the logarithms of how many times as far off and as slow as expected, of errors and speed-ups."""
    error, other = (max(known[0], 1e-6) for known in (found, expected))
    return np.log(np.clip([error / other, expected[1] / found[1]], 0.1, 10.0))


def _between(at: float, known: Sequence[float], values: Sequence[float]) -> float:
    """Returns what lies between known values, straight in the logarithms of both."""
    return math.exp(float(np.interp(math.log(at), np.log(known), np.log(values))))


def _narrowest(recipe: str) -> str:
    """Returns the name of the scheme of a recipe's narrowest linears."""
    how = recipe_of(recipe)
    return OF_BITS[min(OF_BITS)] if how.allocated else next(n for n, s in SCHEMES.items() if s == how.schemes[0])


def _as_tuples(value: Any) -> Any:
    """Returns schedules as they were before they became JSON."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value
