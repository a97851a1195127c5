"""One plan for everything against its parts, and against fewer steps: wall time and quality on a trained model.

Targets of speed and of quality are planned together (`calibrate(target=[…])`) on seeds and labels of their own. Then
every row samples other seeds and labels, batch after batch, since W8A8's noise alone differs by 5 dB between batches of
eight: PSNR against the full computation, what the classifier recognizes, and the time of one whole trajectory over that
of compiled Inductor, measured in turns in one run. `planned` is the PSNR that the calibration measured, `computed` of
the last trajectory. Re-timed plans are for 30 steps, and are compared with 30 full ones.

    OMP_NUM_THREADS=1 python benchmarks/joint.py [--model video|image|text]
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import qc_compiler
from harness import (
    INTERRUPTED,
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
from sampling import DATA_RANGE, shift_times
from subjects import SUBJECTS, Judge, Subject

ROUNDS, BATCHES = 3, 6
TARGETS = ("psnr=30", "psnr=35", "psnr=40", "speedup=6.72", "speedup=10", "psnr=55", "psnr=60", "speedup=4.5")
GENERATIONS = 200  # for all of them
RETIMED = 30
HEADINGS = ("what", "PSNR dB", "planned", "recognized", "× Inductor", "computed", "decided")
RULES: dict[str, dict[str, Any]] = {
    "HLC": {"cache": "hlc", "level": "output", "cache_order": 2, "max_skip": 6},
    "TeaCache": {"cache": "teacache", "level": "network", "cache_order": 1, "max_skip": 6},
    "every n-th step": {"cache": "static", "level": "output", "cache_order": 1},
    "SRAP": {"cache": "off", "prune": "srap"},
}
RULES["naive stack (HLC, W8A8)"] = RULES["HLC"] | {"quantize": "w8a8"}
VALUES = {
    "HLC": (0.003, 0.01, 0.02),
    "naive stack (HLC, W8A8)": (0.003, 0.01, 0.02),
    "TeaCache": (0.05, 0.15, 0.4),
    "every n-th step": (3, 5, 7),
    "SRAP": (0.995, 0.99),
}
KNOBS = {"every n-th step": "interval", "SRAP": "prune_threshold"}  # of the others it is `threshold`
DELTA = 0.2  # of the heads alone
SHARES = (0.1, 0.14, 0.2)  # of schedules alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="video")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100  # each row is a graph of its own, beside Inductor's
    comparison = Comparison(args.model)
    rows = list(comparison.rows())
    how = comparison.subject
    text = header(
        f"One plan for everything: the {how.title}",
        f"OMP_NUM_THREADS=1 python benchmarks/joint.py --model {args.model}",
    )
    plans = list(joint_plans(args.model, comparison.model).values())
    generations = max(plan.measured["generations"] for plan in plans)
    text += (
        f"\n{how.samples} samples in batches of {how.batch}, {how.steps} steps, guidance {how.guidance}; calibrated on "
        f"other seeds and labels, {generations:.0f} generations for all joint plans.\n\n"
    )
    text += f"{table(HEADINGS, rows)}\n![frontier](joint_{args.model}.png)\n"
    draw(rows, plans, args.model)
    write(f"joint_{args.model}.md", text)


def joint_plans(name: str, model: Any) -> dict[str, qc_compiler.Plan]:
    """Returns the joint plans by their targets; several may be met best by one."""
    plans = {target: joint_plan(name, model, target) for target in TARGETS}
    targets: dict[str, list[str]] = {}
    for target, plan in plans.items():
        targets.setdefault(plan.digest, []).append(target)
    return {" and ".join(met): plans[met[0]] for met in targets.values()}


def joint_plan(name: str, model: Any, target: str) -> qc_compiler.Plan:
    """Returns the plan of a target; those of all targets are calibrated at once and share their measurements."""
    page = f"joint_{name}"

    def calibrate() -> qc_compiler.Plan:
        INTERRUPTED.mkdir(parents=True, exist_ok=True)
        found = qc_compiler.calibrate(
            model,
            SUBJECTS[name].calibration_samples,
            target=TARGETS,
            data_range=DATA_RANGE,
            max_generations=GENERATIONS,
            resume=INTERRUPTED / f"{page}.calibration",
            progress=False,
        )
        plans = dict(zip(TARGETS, found))
        for other, plan in plans.items():
            remembered_plan(page, other, lambda plan=plan: plan)  # type: ignore[misc]
        return plans[target]

    return remembered_plan(page, target, calibrate)


def schedule(name: str, model: Any, share: float) -> qc_compiler.Plan:
    """Returns a schedule alone for a share of the work."""
    return alone(name, model, f"schedule_{share}", share=share, level="output")


def heads(name: str, model: Any) -> qc_compiler.Plan:
    """Returns a plan that does nothing but attention, head by head."""
    return alone(name, model, f"heads_{DELTA}", share=None, attention=DELTA)


def alone(name: str, model: Any, called: str, **how: Any) -> qc_compiler.Plan:
    """Returns the plan of one method, calibrated with these arguments."""
    samples = SUBJECTS[name].calibration_samples
    return remembered_plan(
        f"joint_{name}", called, lambda: qc_compiler.calibrate(model, samples, progress=False, **how)
    )


class Comparison:
    """A model, its full computation, and compiled Inductor to be timed against."""

    def __init__(self, name: str) -> None:
        self.name, self.page = name, f"joint_{name}"
        self.subject: Subject = replace(SUBJECTS[name], samples=BATCHES * SUBJECTS[name].batch)
        self.model: Any = self.subject.load().requires_grad_(False)
        self.inductor = torch.compile(self.model)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.subject, self.samples(self.inductor))

    @functools.cached_property
    def retimed_judge(self) -> Judge:
        return Judge(self.subject, self.samples(self.inductor, steps=RETIMED))

    def rows(self) -> Iterator[tuple[str, ...]]:
        yield self.row("Inductor", lambda: self.inductor)
        for targets, found in joint_plans(self.name, self.model).items():
            yield self.row(f"joint, {targets}", lambda found=found: self.compiled(plan=found), found)  # type: ignore[misc]
            yield remembered(self.page, f"re-timed, {targets}", lambda t=targets, found=found: self.retimed(t, found))  # type: ignore[misc]
        for share in SHARES:
            found = schedule(self.name, self.model, share)
            yield self.row(f"schedule, share {share}", lambda found=found: self.compiled(plan=found))  # type: ignore[misc]
        for preset in ("high", "balanced", "fast"):
            yield self.row(f"preset, {preset}", lambda preset=preset: self.compiled(preset=preset))  # type: ignore[misc]
        yield self.row("W8A8", lambda: self.compiled(cache="off", quantize="w8a8"))
        yield self.row(f"heads, δ {DELTA}", lambda: self.compiled(cache="off", plan=heads(self.name, self.model)))
        for rule, options in RULES.items():
            knob = KNOBS.get(rule, "threshold")
            for value in VALUES[rule]:
                named = options | {knob: value, "num_steps": self.subject.steps}
                yield self.row(f"{rule}, {knob} {value}", lambda named=named: self.compiled(**named))  # type: ignore[misc]
        for steps in (5, 7, 10, 13, 17, 25):
            yield remembered(self.page, f"UniPC, {steps} steps", lambda steps=steps: self.fewer(steps))  # type: ignore[misc]

    def samples(self, model: Any, **how: Any) -> Tensor:
        return self.subject.generate(model, self.subject.samples, **how)

    def compiled(self, **options: Any) -> Any:
        return quantcache(self.model, **options)

    def row(self, name: str, make: Callable[[], Any], plan: qc_compiler.Plan | None = None) -> tuple[str, ...]:
        return tuple(remembered(self.page, name, lambda: self.measure(name, make(), plan)))

    def measure(self, name: str, compiled: Any, plan: qc_compiler.Plan | None) -> tuple[str, ...]:
        quality = self.judge(self.samples(compiled))
        planned = f"{plan.measured['psnr']:.1f}" if plan else ""
        share = computed_share(compiled)
        ratio = f"{self.ratio(compiled):.2f}"
        reason = plan.reasons[0] if plan else ""
        return (name, f"{quality.psnr:.1f}", planned, f"{quality.recognized:.1%}", ratio,
                f"{1 if share is None else share:.1%}", reason)  # fmt: skip

    def retimed(self, targets: str, plan: qc_compiler.Plan) -> tuple[str, ...]:
        """Returns the row of a plan for the subject's steps that runs `RETIMED`."""
        how = self.subject
        times = shift_times(torch.linspace(1, 0, RETIMED + 1)[:-1], how.shift)
        compiled = self.compiled(plan=plan.retimed((1000 * times).tolist()))
        quality = self.retimed_judge(self.samples(compiled, steps=RETIMED))
        share = f"{qc_compiler.summary(compiled).computed_share:.1%}"
        return (f"re-timed, {targets}", f"{quality.psnr:.1f}", "", f"{quality.recognized:.1%}", "", share,
                f"{RETIMED} steps")  # fmt: skip

    def fewer(self, steps: int) -> tuple[str, ...]:
        how: dict[str, Any] = {"steps": steps, "solver": "UniPC"}
        quality, share = self.judge(self.samples(self.inductor, **how)), f"{steps / self.subject.steps:.0%}"
        ratio = f"{self.ratio(self.inductor, **how):.2f}"
        return f"UniPC, {steps} steps", f"{quality.psnr:.1f}", "", f"{quality.recognized:.1%}", ratio, share, ""

    def ratio(self, model: Any, **how: Any) -> float:
        """Returns the time of Inductor's trajectory over that of `model`: medians, in turns of about the same time."""
        subject = self.subject
        batches = itertools.cycle(subject.batches(subject.samples))
        plain: list[float] = []
        ours: list[float] = []
        for _ in range(ROUNDS):
            plain.append(timed(lambda: subject.generate(self.inductor))[0])
            while sum(ours) < sum(plain):
                ours.append(timed(functools.partial(subject.trajectory, model, *next(batches), **how))[0])
        return statistics.median(plain) / statistics.median(ours)


def draw(rows: list[tuple[str, ...]], plans: Sequence[qc_compiler.Plan], name: str) -> None:
    """Draws PSNR over speed-up, a line for each method, and what the plans predicted over what was measured."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panel, errors, times = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    methods: dict[str, list[tuple[float, float]]] = {}
    for what, decibels, _, _, ratio, *_ in rows:
        if ratio and float(decibels) < 100:  # above it nothing was changed but the order of sums
            methods.setdefault(what.rpartition(",")[0] or what, []).append((float(ratio), float(decibels)))
    for method, points in methods.items():
        style = {"color": "black", "linewidth": 2.5} if method == "joint" else {"linewidth": 1}
        panel.plot(*zip(*sorted(points)), marker="o", markersize=4, label=method, **style)
    speed_axis(panel)
    panel.set_ylabel("PSNR against the full computation, dB")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower left", fontsize=7, ncols=len(methods))
    joint = [row for row in rows if row[0].startswith("joint")]
    compared = (
        (errors, "predicted_psnr", "PSNR, dB", "psnr", [float(row[1]) for row in joint]),
        (times, "predicted_speedup", "speed-up", "speedup", [float(row[4]) for row in joint]),
    )
    for axes, predicted, what, measured, held_out in compared:
        guesses = [plan.measured[predicted] for plan in plans]
        axes.scatter(guesses, [plan.measured[measured] for plan in plans], label="by the calibration")
        axes.scatter(guesses, held_out, marker="x", label="here, other seeds and labels")
        axes.axline((guesses[0], guesses[0]), slope=1, color="gray", linewidth=1)
        axes.set_xlabel(f"{what}, predicted")
        axes.set_ylabel(f"{what}, measured")
        axes.legend()
    for axes in (panel, errors, times):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"joint_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
