"""Head-wise attention on the trained MMDiT (1024 image tokens) or video DiT: quality, and time against Inductor.

Each budget δ against two ways that treat all heads alike, at as many query–key pairs: the same window everywhere, and
whole layers cached at evenly spaced steps. Then attention together with the cache and W8A8. The video DiT runs with
four times the frames it was trained on; its layers have no one number of tokens, so that there is no one window. Plans
are calibrated on another seed. PSNR and SSIM against the model in full precision, the same seeds for all; `recognized`
by the judge of the captions or labels; times are of one whole trajectory, ours and Inductor's in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/heads.py [--model text|video] [--samples 8] [--steps 20] [--guidance 2.5]
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import qc_compiler
from harness import header, in_turns, remembered, remembered_plan, table, write
from qc_compiler.attention import CACHED, FULL, attended_share
from qc_compiler.heads import half_width
from qc_compiler.plan import HeadPlan, Plan
from sampling import load_model, psnr, resized
from subjects import SUBJECTS, Judge, Subject

BUDGETS = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
ROUNDS, TOGETHER = 2, 0.05
LONG = Subject("video DiT, 32 frames", lambda: resized(load_model(), (32, 16, 16)), (1, 32, 16, 16), 2, 8)
HEADINGS = ("what", "pairs saved", "PSNR dB", "median", "SSIM", "recognized", "× Inductor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("text", "video"), default="text")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100  # each row is a graph of its own, beside Inductor's
    subject = SUBJECTS["text"] if args.model == "text" else LONG
    subject = replace(subject, samples=args.samples, steps=args.steps, guidance=args.guidance)
    comparison = Comparison(subject)
    command = "python benchmarks/heads.py " + " ".join(f"--{name} {value}" for name, value in vars(args).items())
    text = header(f"Head-wise attention on the trained {subject.title}", command)
    size = "×".join(map(str, subject.size[1:]))
    text += f"\n{args.samples} samples of {size}, {args.steps} steps, guidance {args.guidance}.\n"
    text += f"\n{table(HEADINGS, comparison.budgets())}"
    minutes = ", ".join(f"δ = {budget}: {m:.1f}" for budget, m in comparison.minutes.items())
    text += f"\nMinutes of the search, {subject.batch} samples: {minutes}.\n"
    text += f"\n## Together with the cache and W8A8\n\n{table(HEADINGS, comparison.together())}"
    write(f"heads_{args.model}.md", text)


class Comparison:
    """The model, and what it is compared with."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model: Any = subject.load().requires_grad_(False)
        self.inductor = torch.compile(self.model)
        self.judge = Judge(subject, subject.generate(self.inductor, subject.samples))
        kind = "text" if subject.is_text else "video"
        self.page = f"heads_{kind}_{subject.samples}_{subject.steps}_{subject.guidance:g}"
        self.minutes: dict[float, float] = {}
        self.plans: dict[float, Plan] = {}

    def budgets(self) -> list[tuple[str, ...]]:
        rows = [self.row("Inductor", None)]
        for budget in BUDGETS:
            plan = self.calibrate(f"{budget}", share=None, attention=budget)
            self.plans[budget], self.minutes[budget] = plan, plan.measured["attention_minutes"]
            saved = plan.measured["attention_saved"]
            rows.append(self.row(f"δ = {budget}", plan))
            if self.subject.is_text:
                rows.append(self.row(f"same window for all, as δ = {budget}", uniform(plan, saved)))
            rows.append(self.row(f"whole layers cached, as δ = {budget}", layers_cached(plan, saved)))
        return rows

    def together(self) -> list[tuple[str, ...]]:
        heads, schedule = self.plans[TOGETHER], self.calibrate("schedule", share=0.5, level="output")
        both = self.calibrate("both", plan=schedule, attention=TOGETHER)
        return [
            self.row(f"attention, δ = {TOGETHER}", heads),
            self.row("cache, half of the steps", schedule),
            self.row("W8A8", None, quantize="w8a8"),
            self.row("cache and W8A8", schedule, quantize="w8a8"),
            self.row("attention and W8A8", heads, quantize="w8a8"),
            self.row("attention and cache", both),
            self.row("all three", both, quantize="w8a8"),
        ]

    def calibrate(self, name: str, **kwargs: Any) -> Plan:
        def run() -> Plan:
            return qc_compiler.calibrate(self.model, self.subject.calibration_samples, progress=False, **kwargs)

        return remembered_plan(self.page, name, run)

    def row(self, name: str, plan: Plan | None, **options: Any) -> tuple[str, ...]:
        return tuple(remembered(self.page, name, lambda: self.measure(name, plan, options)))

    def measure(self, name: str, plan: Plan | None, options: dict[str, Any]) -> tuple[str, ...]:
        options |= {"plan": plan} if plan else {}
        options |= {} if plan and plan.has_schedule else {"cache": "off"}
        model = torch.compile(self.model, backend="quantcache", options=options) if len(options) > 1 or plan else None
        found = self.subject.generate(self.inductor if model is None else model, self.subject.samples)
        decibels = [psnr(a[None], b[None]) for a, b in zip(found, self.judge.reference)]
        quality = self.judge(found)
        saved = plan.measured.get("attention_saved") if plan else None
        return (
            name,
            "–" if saved is None else f"{saved:.0%}",
            f"{np.mean(decibels):.1f}",
            f"{np.median(decibels):.1f}",
            f"{quality.ssim:.4f}",
            f"{quality.recognized:.1%}",
            "1" if model is None else f"{self.speed_up(model):.2f}",
        )

    def speed_up(self, model: Any) -> float:
        """Returns Inductor's time of a trajectory over ours, medians of runs in turns."""

        def run(each: Any) -> Callable[[], Tensor]:
            return lambda: self.subject.generate(each)

        plain, ours = in_turns([run(self.inductor), run(model)], ROUNDS)
        return statistics.median(plain) / statistics.median(ours)


def uniform(plan: Plan, saved: float) -> Plan:
    """Returns the plan with one window for all heads of all steps but the first, that saves as many pairs."""
    assert plan.attention is not None
    steps, tokens, text = plan.num_steps, 1024 + 8, 8
    wanted = 1 - saved * steps / (steps - 1)
    shares = np.arange(1, 2048) / 1024
    attended = np.array([attended_share(half_width(share, tokens - text), tokens, text) for share in shares])
    at = int(np.abs(attended - wanted).argmin())
    windows = np.full_like(plan.attention.windows, shares[at])
    windows[:, 0] = FULL
    known = plan.measured | {"attention_saved": float(1 - attended[at]) * (steps - 1) / steps}
    return with_windows(plan, windows, known)


def layers_cached(plan: Plan, saved: float) -> Plan:
    """Returns the plan with all heads of all layers cached at evenly spaced steps, as many as save as many pairs."""
    assert plan.attention is not None
    steps = plan.num_steps
    count = round(saved * steps)
    cached = np.diff(np.floor(np.linspace(0, count, steps)).astype(int), prepend=0) > 0
    windows = np.full_like(plan.attention.windows, FULL)
    windows[:, cached] = CACHED
    return with_windows(plan, windows, plan.measured | {"attention_saved": count / steps})


def with_windows(plan: Plan, windows: NDArray[np.float32], measured: dict[str, float]) -> Plan:
    assert plan.attention is not None
    return replace(plan, attention=HeadPlan(plan.attention.layers, windows), measured=measured)


if __name__ == "__main__":
    main()
