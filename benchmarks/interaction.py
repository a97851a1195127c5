"""What quantization and caching do to each other, and what each remedy gives back.

One schedule (a third of 50 steps, calibrated in full precision) and NVFP4 linears, alone and together; then, one after
the other: DMPQ calibrated on samples of the cached trajectory (chosen evenly, by TAP, by k-means, at random), variance
compensation (of the output in the graph; of the sample in a callback), PDR. A second table has an adaptive rule with
and without the noise floor. Same seeds for all, another one for calibration; formats are emulated, so quality only.

    python benchmarks/interaction.py [--model image] [--variant outliers]
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qc_compiler
from harness import header, remembered, remembered_plan, table, write
from qc_compiler.compensation import SampleCompensation
from qc_compiler.controllers.dmpq import DMPQ
from qc_compiler.plan import Plan
from quantization import activation_bits_of, as_video
from sampling import load_classifier, load_dit, load_model, psnr, sample, ssim

STEPS, GUIDANCE, SEED, CALIBRATION_SEED, SHARE, BITS = 50, 2.0, 7, 3, 0.33, 5.0
HEADINGS = ("what", "computed", "activation bits", "PSNR dB", "median", "SSIM", "variance", "recognized", "bounded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video"), default="image")
    parser.add_argument("--variant", choices=("trained", "outliers"), default="trained")
    args = parser.parse_args()
    from outliers import add_outliers  # `harness` has put the examples on the path by now

    model = (load_dit if args.model == "image" else load_model)().requires_grad_(False)
    if args.variant == "outliers":
        model = add_outliers(model).requires_grad_(False)
    experiment = Experiment(model, args.model, f"interaction_{args.model}_{args.variant}")
    command = f"python benchmarks/interaction.py --model {args.model} --variant {args.variant}"
    text = header(f"Quantization and cache together: the {args.model} DiT, {args.variant}", command)
    text += f"\n{STEPS} steps, guidance {GUIDANCE}. `variance`: of the samples, over that in full precision;\n"
    text += "`bounded`: changes that count as the noise floor.\n"
    text += f"\n{table(HEADINGS, experiment.remedies())}"
    text += f"\n## An adaptive rule and the noise floor\n\n{table(HEADINGS, experiment.noise_floor())}"
    write(f"{experiment.page}.md", text)


class Experiment:
    """One model, everything measured against its full precision."""

    def __init__(self, model: Any, name: str, page: str) -> None:
        self.model, self.classifier, self.page = model, load_classifier(), page
        self.size, count = ((1, 16, 16), 40) if name == "image" else ((1, 8, 16, 16), 20)
        self.label = torch.arange(count) % 10
        self.reference = self.generate(model)

    def generate(self, model: Callable[..., Tensor], callback: Any = None) -> Tensor:
        return sample(model, self.label, STEPS, SEED, GUIDANCE, self.size, callback)

    def calibration_samples(self, model: Callable[..., Tensor], callback: Any = None) -> Tensor:
        return sample(model, torch.arange(10), STEPS, CALIBRATION_SEED, GUIDANCE, self.size, callback)

    def calibrate(self, name: str, **kwargs: Any) -> Plan:
        def run() -> Plan:
            return qc_compiler.calibrate(self.model, self.calibration_samples, emulate=True, progress=False, **kwargs)

        found = remembered_plan(self.page, name, run)
        torch._dynamo.reset()
        return found

    def compiled(self, **options: Any) -> Any:
        return torch.compile(self.model, backend="quantcache", options={"emulate": True, **options})

    def remedies(self) -> list[Sequence[str]]:
        schedule = self.calibrate("schedule", share=SHARE)
        rows = [
            self.row("quantization", self.compiled(cache="off", quantize="nvfp4")),
            self.row("cache", self.compiled(plan=schedule)),
            self.row("both, naively", self.compiled(plan=schedule, quantize="nvfp4")),
        ]
        plans = {}
        for selection in ("uniform", "random", "kmeans", "tap"):
            plans[selection] = self.calibrate(selection, plan=schedule, quantize="dmpq", bits=BITS, selection=selection)
            with without_refresh():
                rows.append(self.row(f"+ DMPQ, {selection} samples", self.compiled(plan=plans[selection])))
        corrected = self.calibrate("compensated", plan=plans["tap"], compensate=True)
        with without_refresh():
            plan = self.calibrate("compensated_without_refresh", plan=plans["tap"], compensate=True)
            rows.append(self.row("+ TAP + VC of the output", self.compiled(plan=plan)))
            callback = self.sample_compensation(plans["tap"])
            rows.append(self.row("+ TAP + VC of the sample", self.compiled(plan=plans["tap"]), callback))
        rows.append(self.row("+ TAP + PDR", self.compiled(plan=plans["tap"])))
        rows.append(self.row("+ TAP + PDR + VC of the output", self.compiled(plan=corrected)))
        return rows

    def noise_floor(self) -> list[Sequence[str]]:
        known = self.calibrate("nvfp4", share=None, quantize="nvfp4")
        assert known.quantization is not None
        silent = replace(known, quantization=replace(known.quantization, noise=0 * known.quantization.noise))
        rows = []
        for threshold in (0.003, 0.01, 0.03):
            rule = {"cache": "hlc", "level": "output", "cache_order": 2, "threshold": threshold}
            rows.append(self.row(f"HLC {threshold}, full precision", self.compiled(**rule)))
            rows.append(self.row(f"HLC {threshold}, NVFP4", self.compiled(plan=silent, **rule)))
            rows.append(self.row(f"HLC {threshold}, NVFP4, noise floor", self.compiled(plan=known, **rule)))
        return rows

    def sample_compensation(self, plan: Plan) -> SampleCompensation:
        compressed = self.compiled(plan=plan)
        found = SampleCompensation.fit(
            lambda callback: self.calibration_samples(self.model, callback),
            lambda callback: self.calibration_samples(compressed, callback),
        )
        torch._dynamo.reset()
        return found

    def row(self, name: str, compiled: Any, callback: Any = None) -> Sequence[str]:
        return remembered(self.page, name, lambda: self.measure(name, compiled, callback))

    def measure(self, name: str, compiled: Any, callback: Any) -> tuple[str, ...]:
        from classifier import accuracy

        found = self.generate(compiled, callback)
        bits, share, bounded = "–", "100%", "–"
        with contextlib.suppress(qc_compiler.QuantCacheError):  # nothing is cached: quantization alone
            summary = qc_compiler.summary(compiled)
            share, bounded = f"{summary.computed_share:.0%}", str(sum(stream.num_bounded for stream in summary.streams))
            bits = f"{activation_bits_of(compiled):.2f}" if summary.streams[0].precision is not None else "–"
        torch._dynamo.reset()
        decibels = [psnr(a[None], b[None]) for a, b in zip(found, self.reference)]
        similar = [ssim(as_video(a[None]), as_video(b[None])) for a, b in zip(found, self.reference)]
        return (
            name,
            share,
            bits,
            f"{np.mean(decibels):.1f}",
            f"{np.median(decibels):.1f}",
            f"{np.mean(similar):.4f}",
            f"{float(found.var() / self.reference.var()):.3f}",
            f"{accuracy(self.classifier, found, self.label):.1%}",
            bounded,
        )


@contextlib.contextmanager
def without_refresh() -> Iterator[None]:
    """DMPQ without PDR: no refresh in high precision, outliers quantized like the rest."""
    refreshes, decide = DMPQ._refreshes, DMPQ.decide
    DMPQ._refreshes = staticmethod(lambda history, region: not history.computed_at(region))  # type: ignore[method-assign]
    DMPQ.decide = lambda self, *args: decide(replace(self, outliers=()), *args)  # type: ignore[method-assign]
    try:
        yield
    finally:
        DMPQ._refreshes, DMPQ.decide = staticmethod(refreshes), decide  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
