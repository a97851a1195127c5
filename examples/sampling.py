"""Sample from the example model, load its weights, and compare videos.

The model learns a rectified flow (arXiv 2209.03003): on the straight path x_t = (1 - t) data + t noise it
predicts the velocity dx/dt = noise - data. Sampling follows it from t = 1 to 0 in Euler steps. The model is
given 1000 t as its timestep.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from classifier import DigitClassifier
from digits import CANVAS, NUM_DIGITS, NUM_FRAMES
from dit import DiT, DiTConfig
from mmdit import MMDiT, MMDiTConfig
from stdit import STDiT, STDiTConfig

WEIGHTS = Path(__file__).parent / "weights"
NULL_LABEL = NUM_DIGITS
DATA_RANGE = 2.0  # videos are in [-1, 1]


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Moves times of the flow in [0, 1] towards the noise, for shifts over 1, as `sample` documents."""
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def sample(
    model: Callable[..., torch.Tensor],
    label: torch.Tensor,
    steps: int = 50,
    seed: int = 0,
    guidance: float = 1.0,
    size: tuple[int, ...] = (1, NUM_FRAMES, CANVAS, CANVAS),
    callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
    shift: float = 1.0,
) -> torch.Tensor:
    """Generates one video or image for each label or caption.

    Args:
        model: maps (x, timestep, label) to velocity: one of the examples, compiled or not.
        label: (B,) or captions (B, T), int64, on the model's device.
        steps: Euler steps, all of the same length if `shift` is 1.
        seed: of the initial noise, which is drawn on the CPU and so is the same on every device.
        guidance: strength w of classifier-free guidance: v_null + w (v_label - v_null). At 1 the model runs
            once a step; otherwise twice, first with the label, then without.
        size: C, F, H, W of a video, or C, H, W of an image.
        callback_on_step_end: As in diffusers' pipelines: (pipe, step, timestep, {"latents": x}) → the same dict.
        shift: s of t ↦ s·t / (1 + (s - 1)·t), which takes smaller steps near the noise, where large images need them
            (arXiv 2403.03206, section 5.3.2).

    Returns:
        video (B, C, F, H, W) or image (B, C, H, W), float32, about [-1, 1].
    """
    batch = label.shape[0]
    null_label = torch.full_like(label, NULL_LABEL)
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed)).to(label.device)
    times = shift_times(torch.linspace(1, 0, steps + 1), shift).tolist()
    for step, (t, t_next) in enumerate(pairwise(times)):
        timestep = torch.full((batch,), 1000 * t, device=label.device)
        velocity = model(x, timestep, label)
        if guidance != 1:
            unguided = model(x, timestep, null_label)
            velocity = unguided + guidance * (velocity - unguided)
        x = x + (t_next - t) * velocity
        if callback_on_step_end is not None:
            x = callback_on_step_end(None, step, timestep, {"latents": x})["latents"]
    return x


def save_weights(module: nn.Module, path: Path, config: dict[str, object], dtype: torch.dtype) -> None:
    """Writes the module's weights as `dtype`, with its config as JSON in the header's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to(dtype).contiguous() for name, weight in module.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(config)})


def _read_weights(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Returns config and float32 weights; JSON's lists come back as tuples, as a frozen config holds them."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}, weights


def load_model(path: Path | str | None = None) -> STDiT:
    """Returns the trained video model, float32, in eval mode; by default from `weights/stdit.safetensors`."""
    config, weights = _read_weights(Path(path or WEIGHTS / "stdit.safetensors"))
    model = STDiT(STDiTConfig(**config))  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return model.eval()


def resized(model: DiT | STDiT | MMDiT, size: tuple[int, ...]) -> DiT | STDiT | MMDiT:
    """Returns the model for images of another height and width, or videos of another (F, H, W)."""
    other = type(model)(replace(model.config, size=size))  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())  # the positions are no part of it
    return other.eval()


def load_dit(path: Path | str | None = None) -> DiT:
    """Returns the trained image model, float32, in eval mode; by default from `weights/dit.safetensors`."""
    config, weights = _read_weights(Path(path or WEIGHTS / "dit.safetensors"))
    model = DiT(DiTConfig(**config))  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return model.eval()


def load_mmdit(path: Path | str | None = None) -> MMDiT:
    """Returns the trained model of captions, float32, in eval mode; by default from `weights/mmdit.safetensors`."""
    config, weights = _read_weights(Path(path or WEIGHTS / "mmdit.safetensors"))
    model = MMDiT(MMDiTConfig(**config))  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return model.eval()


def load_classifier(path: Path | str | None = None) -> DigitClassifier:
    """Returns the trained classifier in eval mode; by default from `weights/classifier.safetensors`."""
    config, weights = _read_weights(Path(path or WEIGHTS / "classifier.safetensors"))
    classifier = DigitClassifier(**config)  # type: ignore[arg-type]
    classifier.load_state_dict(weights)
    return classifier.eval()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of videos (B, C, F, H, W), averaged over the batch.

    A pair of equal videos has an infinite ratio, and so makes the average infinite.

    >>> a = torch.zeros(2, 1, 8, 16, 16)
    >>> round(psnr(a, a + 0.2), 3)
    20.0
    """
    error = (a - b).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(DATA_RANGE**2 / error)).mean().item()


def ssim(a: torch.Tensor, b: torch.Tensor, window: int = 7) -> float:
    """Returns the structural similarity of videos (B, C, F, H, W), averaged over windows, frames, batch.

    Uniform windows that lie wholly inside a frame, unbiased variances, K1 = 0.01, K2 = 0.03, data range
    2: what `skimage.metrics.structural_similarity` does by default.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004, equation 13.

    >>> a = torch.rand(2, 1, 8, 16, 16)
    >>> round(ssim(a, a), 3)
    1.0
    """
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    a, b = (video.double().flatten(0, 2).unsqueeze(1) for video in (a, b))
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = (F.avg_pool2d(x, window, stride=1) for x in (a, b, a * a, b * b, a * b))
    unbiased = window**2 / (window**2 - 1)
    var_a, var_b = unbiased * (mean_aa - mean_a**2), unbiased * (mean_bb - mean_b**2)
    covariance = unbiased * (mean_ab - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean().item()
