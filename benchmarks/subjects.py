"""The trained models of `examples/`, and how each is sampled and judged: what every comparison here has in common."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import harness  # noqa: F401 (puts the examples on the path)
from captions import caption_accuracy, captioned_digits
from classifier import accuracy, frechet_distance
from digits import moving_digits, placed_digits
from sampling import NULL_LABEL, load_classifier, load_dit, load_mmdit, load_model, psnr, sample, ssim

SEED, CALIBRATION_SEED = 7, 123
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Subject:
    """A trained model and how it is sampled.

    Attributes:
        title: What its page calls it.
        size: Of a sample, (C, H, W) or (C, F, H, W).
        batch: Samples of one trajectory.
        samples: That are compared; what is calibrated or timed is one batch.
    """

    title: str
    load: Callable[[], Any]
    size: tuple[int, ...]
    batch: int
    samples: int
    steps: int = 50
    guidance: float = 2.0
    shift: float = 1.0

    @property
    def is_text(self) -> bool:
        return self.load is load_mmdit

    def labels(self, count: int, seed: int = SEED) -> Tensor:
        """Returns labels (count,) or captions (count, T); of the seed of calibration others than of any other."""
        if self.is_text:
            return captioned_digits(count, seed)[1]
        return (torch.arange(count) + (count if seed == CALIBRATION_SEED else 0)) % 10

    def batches(self, count: int, seed: int = SEED) -> list[tuple[Tensor, int]]:
        """Returns labels or captions and the seed of each batch of `count` samples."""
        return [(labels, seed + i) for i, labels in enumerate(self.labels(count, seed).split(self.batch))]

    def generate(self, model: Model, count: int = 0, seed: int = SEED, steps: int = 0, solver: str = "") -> Tensor:
        """Returns samples, a trajectory for each batch; `begin` of the model, if it has one, is called before each.

        Args:
            count: Of samples, 0 for one batch.
            steps: 0 for the subject's.
            solver: "" for the examples' Euler steps, or a name in `SOLVERS`.
        """
        batches = self.batches(count or self.batch, seed)
        return torch.cat([self.trajectory(model, *batch, steps, solver) for batch in batches])

    def trajectory(self, model: Model, labels: Tensor, seed: int, steps: int = 0, solver: str = "") -> Tensor:
        """Returns samples of these labels; arguments as of `generate`."""
        run = functools.partial(solve, solver) if solver else sample
        getattr(model, "begin", lambda: None)()
        labels = labels.to(device_of(model))
        return run(model, labels, steps or self.steps, seed, self.guidance, self.size, shift=self.shift)

    def calibration_samples(self, model: Model) -> Tensor:
        """Returns one batch of another seed and other labels, as `generate` of `qc_compiler.calibrate`."""
        return self.generate(model, seed=CALIBRATION_SEED)

    def real(self, count: int) -> Tensor:
        """Returns samples of what the model was trained on."""
        if self.is_text:
            return captioned_digits(count, 1)[0]
        return (moving_digits if len(self.size) == 4 else placed_digits)(count, 1)[0]


SUBJECTS = {
    "video": Subject("video DiT", load_model, (1, 8, 16, 16), batch=8, samples=24),
    "image": Subject("image DiT", load_dit, (1, 16, 16), batch=8, samples=120),
    "text": Subject("MMDiT", load_mmdit, (1, 64, 64), batch=2, samples=8, guidance=2.5, shift=4.0),
}


@dataclass(frozen=True)
class Quality:
    """What samples are worth, against those of the full computation and against the digits they are asked to show.

    Attributes:
        psnr: Mean of the samples', as the planner means it, in dB.
        ssim: Mean over the samples.
        distance: Mean squared distance of the classifier's features, over that of two different samples: 0 is the
            same, 1 as far apart as any two.
        recognized: Share of the samples that show what they were asked for.
        frechet: Fréchet distance of the classifier's features to real samples.
    """

    psnr: float
    ssim: float
    distance: float
    recognized: float
    frechet: float

    def cells(self) -> tuple[str, str, str, str, str]:
        return (
            f"{self.psnr:.1f}", f"{self.ssim:.4f}", f"{self.distance:.4f}", f"{self.recognized:.1%}",
            f"{self.frechet:.2f}",
        )  # fmt: skip


class Judge:
    """Compares samples of a subject with those of its full computation."""

    def __init__(self, subject: Subject, reference: Tensor) -> None:
        self.subject, self.reference, self.classifier = subject, reference.cpu(), load_classifier()
        self.labels = subject.labels(len(reference))
        self.expected, self.real = self.features(self.reference), self.features(subject.real(len(reference)))

    def __call__(self, found: Tensor) -> Quality:
        found = found.cpu()
        pairs = [(as_video(a[None]), as_video(b[None])) for a, b in zip(found, self.reference)]
        features = self.features(found)
        apart = (features - self.expected).square().sum(dim=1).mean()
        strangers = (self.expected - self.expected.roll(1, dims=0)).square().sum(dim=1).mean()
        recognize = caption_accuracy if self.subject.is_text else accuracy
        return Quality(
            psnr(found, self.reference),
            sum(ssim(a, b) for a, b in pairs) / len(pairs),
            float(apart / strangers),
            recognize(self.classifier, found, self.labels),
            frechet_distance(features, self.real),
        )

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        """Returns the classifier's features (N, K), the mean of the frames of a video."""
        return torch.cat([self.classifier.embed(part).mean(dim=1) for part in samples.split(100)])


def as_video(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 4 else x


def device_of(model: Any) -> torch.device:
    """Returns where a model, compiled or wrapped, computes; the CPU for a plain function."""
    inner = getattr(model, "_orig_mod", model)
    first = next(inner.parameters(), None) if isinstance(inner, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


SOLVERS = {"UniPC": "UniPCMultistepScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler"}


@torch.no_grad()
def solve(
    solver: str,
    model: Model,
    label: Tensor,
    steps: int,
    seed: int,
    guidance: float,
    size: tuple[int, ...],
    shift: float = 1.0,
) -> Tensor:
    """Samples like `sampling.sample`, with one of diffusers' multistep solvers on the same rectified flow."""
    import diffusers

    scheduler = getattr(diffusers, SOLVERS[solver])(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    scheduler.set_timesteps(steps, device=label.device)
    x = torch.randn(len(label), *size, generator=torch.Generator().manual_seed(seed)).to(label.device)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        time = torch.full((len(label),), 1000 * float(sigma), device=label.device)
        velocity = model(x, time, label)
        unguided = model(x, time, torch.full_like(label, NULL_LABEL))
        x = scheduler.step(unguided + guidance * (velocity - unguided), timestep, x).prev_sample
    return x
