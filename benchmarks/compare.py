"""Where quantcache stands: ours, fewer steps and what a user would pick instead, on one trained model in one process.

Every method runs the same model, seeds, labels and sampler. Quality is against the full computation (the model's own
sampler at full steps), over several batches, a trajectory each; all but the first are timed, and between them compiled
Inductor: 20 steps of it, which stand for all. The first setting of each method is compiled cold (empty caches) and warm
(caches on disk, as in the next process). `computed` is the share of the block computations that a method says it made;
`memory` the most the process held beyond its weights in one trajectory.

Rows are kept in `out/benchmarks`, so that an interrupted run goes on. Needs `pip install ".[peers]"`; the row of a peer
that fails says so.

    OMP_NUM_THREADS=1 python benchmarks/compare.py [--model video|image|text] [--only ours|peers|steps]
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch._inductor.utils import fresh_cache

import peers
import qc_compiler
from harness import (
    RESULTS,
    computed_share,
    header,
    quantcache,
    remembered,
    remembered_plan,
    speed_axis,
    table,
    timed,
    write,
)
from joint import joint_plans, schedule
from memory import peak, resident
from qc_compiler.plan import Plan
from subjects import CALIBRATION_SEED, SUBJECTS, Judge, Subject

MIB, SHARES, BASELINE_STEPS = 2**20, (0.33, 0.2, 0.1), 20
QUALITY = ("method", "computed", "× Inductor", "PSNR dB", "SSIM", "distance", "recognized", "Fréchet")
COSTS = (
    "method",
    "a trajectory, s",
    "a step, ms",
    "compiled cold, s",
    "warm, s",
    "weights MiB",
    "slots MiB",
    "memory MiB",
)


@dataclass(frozen=True)
class Method:
    """A way to sample.

    Attributes:
        make: Returns what is called in the model's place.
        steps: Of its sampler, 0 for the subject's.
        solver: Of `subjects.SOLVERS`, "" for the subject's own sampler.
    """

    family: str
    name: str
    make: Callable[[Any], Any]
    steps: int = 0
    solver: str = ""

    @property
    def line(self) -> str:
        """The name without its setting."""
        return self.name.rpartition(",")[0] or self.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="image")
    parser.add_argument("--only", choices=("ours", "peers", "steps"))
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    comparison = Comparison(args.model)
    rows = [comparison.row(method) for method in comparison.methods() if args.only in (None, method.family)]
    subject = comparison.subject
    text = header(
        f"Side by side: the {subject.title}", f"OMP_NUM_THREADS=1 python benchmarks/compare.py --model {args.model}"
    )
    text += (
        f"\n{subject.samples} samples in batches of {subject.batch}, {subject.steps} steps, guidance "
        f"{subject.guidance}; times are medians of the trajectories (fastest–slowest).\n\n"
    )
    text += f"{table(QUALITY, [row[:8] for row in rows])}\n![frontier](compare_{args.model}.png)\n\n"
    text += table(COSTS, [(row[0], *row[8:]) for row in rows])
    draw(rows, args.model)
    write(f"compare_{args.model}.md", text)


class Comparison:
    """A subject, its full computation and compiled Inductor to be timed against."""

    def __init__(self, name: str) -> None:
        self.name, self.page, self.calibration_samples = name, f"compare_{name}", SUBJECTS[name].calibration_samples
        self.subject: Subject = SUBJECTS[name]
        if self.subject.is_text:  # one prompt at a time: it is by far the slowest
            self.subject = replace(self.subject, batch=1, samples=4)
        self.model: Any = self.subject.load().requires_grad_(False)
        self.inductor = torch.compile(self.model)
        self.judge = Judge(self.subject, self.subject.generate(self.inductor, self.subject.samples))
        self._compiled: set[str] = set()  # of which methods compilation has been timed

    def methods(self) -> Iterator[Method]:
        """Yields ours, fewer steps, and the peers."""
        yield Method("steps", "eager", lambda model: model)
        yield Method("steps", "Inductor", torch.compile)
        for steps in (25, 10):
            yield Method("steps", f"fewer steps (Euler), {steps}", torch.compile, steps)
        for solver, settings in {"UniPC": (20, 10, 7), "DPM-Solver++": (10,)}.items():
            for steps in settings:
                yield Method("steps", f"fewer steps ({solver}), {steps}", torch.compile, steps, solver)
        yield from self.ours()
        yield from self.peers()

    def ours(self) -> Iterator[Method]:
        for preset in ("high", "balanced", "fast"):
            yield Method("ours", f"preset, {preset}", lambda model, preset=preset: quantcache(model, preset=preset))
        for share in SHARES:
            plan = schedule(self.name, self.model, share)
            yield Method("ours", f"schedule, {share}", lambda model, plan=plan: quantcache(model, plan=plan))
        yield Method("ours", "W8A8, alone", lambda model: quantcache(model, cache="off", quantize="w8a8"))
        for targets, plan in joint_plans(self.name, self.model).items():
            yield Method("ours", f"joint plan, {targets}", lambda model, plan=plan: quantcache(model, plan=plan))
        yield Method("ours", "schedule on 20 UniPC steps, 0.5", self.on_unipc, 20, "UniPC")

    def peers(self) -> Iterator[Method]:
        steps = self.subject.steps
        for order in (0, 1):
            title = "cache-dit, DBCache + TaylorSeer" if order else "cache-dit, DBCache"
            for threshold in (0.1, 0.3):
                yield Method(
                    "peers", f"{title}, {threshold}",
                    lambda model, t=threshold, order=order: peers.cache_dit(model, steps, t, order),
                )  # fmt: skip
        yield Method(
            "peers",
            "cache-dit, its steps + TaylorSeer, ultra",
            lambda model: peers.cache_dit(model, steps, 0.1, 1, "ultra"),
        )
        for threshold in (0.05, 0.15):
            yield Method(
                "peers", f"diffusers, FirstBlockCache, {threshold}",
                lambda model, t=threshold: peers.first_block_cache(model, t),
            )  # fmt: skip
        for interval in (3, 5, 8):
            yield Method(
                "peers", f"diffusers, TaylorSeer, {interval}",
                lambda model, interval=interval: peers.taylorseer(model, interval),
            )  # fmt: skip
        yield Method("peers", "diffusers, MagCache, 0.06", self.mag_cache)
        yield Method("peers", "torchao int8, dynamic", lambda model: torch.compile(peers.torchao_int8_dynamic(model)))
        yield Method("peers", "torchao NVFP4, weights", lambda model: torch.compile(peers.torchao_nvfp4_weights(model)))
        yield Method(
            "peers", "cache-dit + TaylorSeer + torchao int8, 0.15",
            lambda model: peers.cache_dit(peers.torchao_int8_dynamic(model), steps, 0.15, 1),
        )  # fmt: skip

    def on_unipc(self, model: Any) -> Any:
        def samples(compiled: Any) -> Tensor:
            return SUBJECTS[self.name].generate(compiled, seed=CALIBRATION_SEED, steps=20, solver="UniPC")

        def run() -> Plan:
            return qc_compiler.calibrate(model, samples, share=0.5, level="output", progress=False)

        return quantcache(model, plan=remembered_plan(self.page, "schedule_on_unipc", run))

    def mag_cache(self, model: Any) -> Any:
        return peers.mag_cache(model, self.subject.steps, 0.06, self.calibration_samples)

    def row(self, method: Method) -> tuple[str, ...]:
        return tuple(remembered(self.page, method.name, lambda: self.measure(method)))

    def measure(self, method: Method) -> tuple[str, ...]:
        try:
            return self._measure(method)
        except Exception as error:  # a peer's failure is a result
            if method.family != "peers":
                raise
            reason = str(error).strip().splitlines()[0]
            return method.name, f"failed: {type(error).__name__}: {reason[:90]}", *[""] * 13
        finally:
            torch._dynamo.reset()

    def _measure(self, method: Method) -> tuple[str, ...]:
        subject = self.subject
        model, batches = method.make(self.model), subject.batches(subject.samples)

        def run(i: int = 0) -> Tensor:
            return subject.trajectory(model, *batches[i], method.steps, method.solver)

        first, compiling = self._compiling(method, run)
        subject.generate(self.inductor, steps=2)  # compiles
        plain, taken, samples, memory = [], [], [first], 0
        for i in range(1, len(batches)):
            if (i - 1) % max(1, len(batches) // 2) == 0:
                plain.append(self._plain_seconds())
            reset_peak()
            before = resident()
            seconds, found = timed(lambda i=i: run(i))  # type: ignore[misc]
            memory = max(memory, peak() - before)
            taken.append(seconds)
            samples.append(found)
        quality = self.judge(torch.cat(samples))
        share, slots = computed_share(model), None
        if share is not None:
            slots = qc_compiler.summary(model).peak_slot_bytes
        seconds = statistics.median(taken)
        return (
            method.name,
            "" if share is None else f"{share:.0%}",
            f"{statistics.median(plain) / seconds:.2f}",
            *quality.cells(),
            f"{seconds:.2f} ({min(taken):.2f}–{max(taken):.2f})",
            f"{seconds / (method.steps or subject.steps) * 1e3:.1f}",
            *([f"{total:.1f}" for total in compiling] or ["", ""]),
            f"{bytes_of(module_of(model)) / MIB:.1f}",
            "" if slots is None else f"{slots / MIB:.2f}",
            f"{memory / MIB:.0f}",
        )

    def _plain_seconds(self) -> float:
        """Returns what Inductor's trajectory takes: all its steps take the same, so that some of them tell."""
        seconds, _ = timed(lambda: self.subject.generate(self.inductor, steps=BASELINE_STEPS))
        return seconds * self.subject.steps / BASELINE_STEPS

    def _compiling(self, method: Method, run: Callable[[], Tensor]) -> tuple[Tensor, list[float]]:
        """Compiles a method; returns a batch, and the seconds cold and warm of the first setting of its line."""
        torch._dynamo.reset()
        if method.line in self._compiled:
            return run(), []
        self._compiled.add(method.line)
        with fresh_cache():
            cold, _ = timed(run, time.perf_counter)
            torch._dynamo.reset()
            warm, _ = timed(run, time.perf_counter)
        again, batch = timed(run, time.perf_counter)
        return batch, [max(0.0, cold - again), max(0.0, warm - again)]


def bytes_of(model: torch.nn.Module) -> int:
    """Returns what the weights take, where they are of a subclass by the tensors it consists of."""
    inner = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if hasattr(tensor, "__tensor_flatten__"):
            inner += sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
        else:
            inner += tensor.nbytes
    return inner


def reset_peak() -> None:
    """Lets the kernel count this process's peak memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def module_of(model: Any) -> torch.nn.Module:
    return getattr(model, "module", getattr(model, "_orig_mod", model))


def draw(rows: list[tuple[str, ...]], name: str) -> None:
    """Draws PSNR over speed-up: ours in black, a line for every method with more than one setting."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    methods: dict[str, list[tuple[float, float]]] = {}
    for what, _, ratio, decibels, *_ in rows:
        if decibels not in ("", "inf") and what != "eager":
            methods.setdefault(what.rpartition(",")[0] or what, []).append((float(ratio), float(decibels)))
    for number, (method, points) in enumerate(methods.items()):
        ours = method in ("preset", "schedule", "joint plan", "W8A8", "schedule on 20 UniPC steps")
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if ours else {"linewidth": 1}
        marker = "os^vD<>PX*hpd8"[number % 14]
        panel.plot(*zip(*sorted(points)), marker=marker, markersize=5, label=method, **style)
    panel.axhline(35, color="gray", linewidth=1, linestyle=":")
    speed_axis(panel)
    panel.set_ylabel("PSNR against the full computation, dB")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(RESULTS / f"compare_{name}.png", dpi=120)


if __name__ == "__main__":
    main()
