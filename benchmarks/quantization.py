"""Quality of quantized models, without any cache: the trained video DiT and the trained image DiT, as they are or with
function-preserving outliers.

Same seeds and labels for all. PSNR and SSIM against the full precision (mean, and the median of the single samples,
since one sample that goes another way moves a mean by decibels), accuracy of the digit classifier, Fréchet distance of
the classifier's features to real digits. Formats are emulated in plain torch (`emulate=True`), so that every one can be
measured on every device: quality only, no speed. Importance and DMPQ are calibrated on another seed; the line behind
each gives as many bits to every n-th linear, without asking which.

Needs `pip install ".[peers]"` for torchao's line.

    python benchmarks/quantization.py [--model image] [--variant outliers] [--samples 2000] [--steps 20]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import qc_compiler
from harness import header, remembered, remembered_plan, table, write
from peers import fast_int_mm, torchao_int8_dynamic
from qc_compiler.plan import Plan
from sampling import load_classifier, load_dit, load_model, psnr, sample, ssim

SEED, CALIBRATION_SEED, PAIRED = 7, 3, 100
SCHEMES = (
    "w8a8",
    "w8a8+balance",
    "fp8",
    "w4a8",
    "w4a8+balance",
    "w4a8+rank32",
    "w4a6",
    "w4a6+rotation",
    "w4a6+balance",
    "w4a6+balance+rotation",
    "nvfp4",
    "nvfp4+rotation",
    "nvfp4+balance",
)
HEADINGS = ("scheme", "weight bits", "activation bits", "PSNR dB", "median", "SSIM", "median", "recognized", "Fréchet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video"), default="image")
    parser.add_argument("--variant", choices=("trained", "outliers"), default="trained")
    parser.add_argument("--samples", type=int, default=2000, help="of the Fréchet distance")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    from outliers import add_outliers  # `harness` has put the examples on the path by now

    model = (load_dit if args.model == "image" else load_model)().requires_grad_(False)
    if args.variant == "outliers":
        model = add_outliers(model).requires_grad_(False)
    rows = list(Comparison(model, args).rows())
    command = "python benchmarks/quantization.py " + " ".join(f"--{name} {value}" for name, value in vars(args).items())
    text = header(f"Quality of quantized models: the {args.model} DiT, {args.variant}", command)
    text += f"\n{args.steps} steps, guidance {args.guidance}; PSNR and SSIM over the first {PAIRED} samples.\n"
    write(f"quantization_{args.model}_{args.variant}.md", f"{text}\n{table(HEADINGS, rows)}")


class Comparison:
    """One model and what it is compared with."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self.model, self.args, self.classifier = model, args, load_classifier()
        self.size = (1, 16, 16) if args.model == "image" else (1, 8, 16, 16)
        self.batch = min(100 if args.model == "image" else 10, args.samples)
        self.page = f"quantization_{args.model}_{args.variant}_{args.samples}_{args.steps}_{args.guidance:g}"
        self.reference = self.generate(model, min(PAIRED, args.samples), SEED)
        self.real = self._features(real_samples(args.model, args.samples))

    def generate(self, model: Callable[..., Tensor], count: int, seed: int) -> Tensor:
        """Returns `count` samples, their labels in turn."""
        label = torch.arange(self.batch) % 10
        parts = range(-(-count // self.batch))
        videos = [sample(model, label, self.args.steps, seed + i, self.args.guidance, self.size) for i in parts]
        return torch.cat(videos)

    def calibration_samples(self, model: Callable[..., Tensor]) -> Tensor:
        return sample(model, torch.arange(10), self.args.steps, CALIBRATION_SEED, self.args.guidance, self.size)

    def rows(self) -> Iterator[Sequence[str]]:
        yield self.row("full precision", self.model, "32", "32")
        with fast_int_mm():
            yield self.row("torchao int8 dynamic", torchao_int8_dynamic(self.model), "8", "8")
        for scheme in SCHEMES:
            plan = self._calibrated(scheme) if "balance" in scheme else None
            yield self.row(scheme, self.compiled(scheme, plan), *bits_of(scheme))
        plan = self._calibrated("importance", bits=5.0)
        yield self._by_plan("importance", plan)
        yield self._by_plan("as many bits, spread evenly", static_bits(plan, self.sizes(plan)))
        plan = self._calibrated("dmpq", bits=5.0)
        yield self._by_plan("dmpq", plan)
        yield self._by_plan("as many bits, the same at all steps", static_precision(plan))

    def _calibrated(self, recipe: str, **kwargs: Any) -> Plan:
        def run() -> Plan:
            model, generate = self.model, self.calibration_samples
            return qc_compiler.calibrate(model, generate, None, quantize=recipe, progress=False, **kwargs)

        found = remembered_plan(self.page, recipe, run)
        torch._dynamo.reset()
        return found

    def _by_plan(self, name: str, plan: Plan) -> Sequence[str]:
        assert plan.quantization is not None
        recipe = plan.quantization.recipe
        activation_bits = None if recipe == "dmpq" else "8.00"
        return self.row(name, self.compiled(recipe, plan), self._weight_bits(plan), activation_bits)

    def _weight_bits(self, plan: Plan) -> str:
        known = plan.quantization
        assert known is not None
        if known.recipe == "dmpq":
            return "4.50"
        return f"{mean_bits(known.bits, self.sizes(plan)):.2f}"

    def sizes(self, plan: Plan) -> NDArray[np.int_]:
        assert plan.quantization is not None
        return np.array([self.model.get_parameter(f"{site}.weight").numel() for site in plan.quantization.sites])

    def compiled(self, quantize: str, plan: Plan | None) -> Any:
        options = {"cache": "off", "emulate": True, "quantize": quantize} | ({"plan": plan} if plan else {})
        return torch.compile(self.model, backend="quantcache", options=options)

    def row(self, name: str, model: Any, weight_bits: str, activation_bits: str | None) -> Sequence[str]:
        return remembered(self.page, name, lambda: self.measure(name, model, weight_bits, activation_bits))

    def measure(self, name: str, model: Any, weight_bits: str, activation_bits: str | None) -> tuple[str, ...]:
        from classifier import accuracy, frechet_distance

        found = self.generate(model, self.args.samples, SEED)
        activation_bits = activation_bits or f"{activation_bits_of(model):.2f}"
        torch._dynamo.reset()
        pairs = [(as_video(a[None]), as_video(b[None])) for a, b in zip(found, self.reference)]
        decibels = [psnr(a, b) for a, b in pairs]
        similar = [ssim(a, b) for a, b in pairs]
        label = torch.arange(len(found)) % self.batch % 10
        return (
            name,
            weight_bits,
            activation_bits,
            f"{np.mean(decibels):.1f}",
            f"{np.median(decibels):.1f}",
            f"{np.mean(similar):.4f}",
            f"{np.median(similar):.4f}",
            f"{accuracy(self.classifier, found, label):.1%}",
            f"{frechet_distance(self._features(found), self.real):.3f}",
        )

    @torch.no_grad()
    def _features(self, video: Tensor) -> Tensor:
        return torch.cat([self.classifier.embed(part).mean(dim=1) for part in video.split(100)])


def static_bits(plan: Plan, sizes: NDArray[np.int_]) -> Plan:
    """Returns the plan with eight bits at every n-th linear, n as large as gives no fewer bits in the mean."""
    known = plan.quantization
    assert known is not None
    bits = known.bits
    for count in range(len(bits) + 1):
        bits = np.full(len(sizes), 4, dtype=np.int8)
        bits[np.linspace(0, len(bits) - 1, count).round().astype(int)] = 8
        if mean_bits(bits, sizes) >= mean_bits(known.bits, sizes):
            break
    return replace(plan, quantization=replace(known, bits=bits))


def mean_bits(bits: NDArray[np.int8], sizes: NDArray[np.int_]) -> float:
    return float(bits @ sizes / sizes.sum())


def static_precision(plan: Plan) -> Plan:
    """Returns the plan with a fixed quarter of the linears in eight bits, whatever was measured."""
    known = plan.quantization
    assert known is not None
    high = (np.arange(len(known.sites)) % 4 == 0).astype(np.float32)
    return replace(plan, quantization=replace(known, alpha=0 * high, beta=high, threshold=0.5))


def activation_bits_of(model: Any) -> float:
    """Returns the mean bits of the activations of the last trajectory, over linears and computed steps."""
    taken = np.concatenate([stream.precision.ravel() for stream in qc_compiler.summary(model).streams])
    return float(np.array([4.0, 8.0, 16.0])[taken[taken >= 0]].mean())


def bits_of(scheme: str) -> tuple[str, str]:
    base = scheme.split("+")[0]
    known = {"fp8": ("8", "8"), "nvfp4": ("4.50", "4.50")}
    return known.get(base) or (base[1], base[3])


def real_samples(model: str, count: int) -> Tensor:
    from digits import moving_digits, placed_digits

    return (placed_digits if model == "image" else moving_digits)(count, 1)[0]


def as_video(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 4 else x


if __name__ == "__main__":
    main()
