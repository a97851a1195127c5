"""VC, variance compensation: quantization and caching together make the variance of samples drift; this undoes it.

    x̃ = μ + K·(x̂ − μ)      for each step and channel; μ the mean of x̂
    K = (Σ a·b + Σ a·b/x'²) / (Σ a² + Σ a²/x'²),   a = x̂ − μ,  b = x' − μ

with x̂ what the compressed model makes and x' what the full one does, from the same noise. Source: Q&C, arXiv
2503.02508; the K printed there is right for μ = 0 only, this one minimizes Σ (x̃ − x')² + Σ ((x̃ − x')/x')² for any μ.
K is clamped to [0.5, 2], and |x'| held above its root mean square: a lower floor lets a few elements near zero, which
an error of the mean reaches first, decide the gain of all (at a tenth the error of a tiny DiT rises by 40 %).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError

LIMITS = (0.5, 2.0)
SMALL = 1.0  # of the root mean square


def channel_axis(num_dims: int) -> int:
    """Returns the axis of an output's channels: of images and videos the second, of tokens the last."""
    return 1 if num_dims >= 4 else num_dims - 1


def compensate(x: Tensor, correction: Tensor) -> Tensor:
    """Returns shift + gain · x for each channel, in the dtype of x.

    Args:
        x: (B, C, …) or (B, n, C).
        correction: float32 (C, 2), shift and gain.
    """
    axis = channel_axis(x.dim())
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    return (correction[:, 0].view(shape) + correction[:, 1].view(shape) * x).to(x.dtype)


def fit_correction(x_hat: Tensor, reference: Tensor) -> Tensor:
    """Returns shift μ·(1 − K) and gain K of each channel, float32 (C, 2).

    >>> x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> fit_correction(0.8 * x, x)[:, 1].round(decimals=2)
    tensor([1.2500, 1.2500])
    """
    axis = channel_axis(x_hat.dim())
    found, wanted = (x.double().movedim(axis, 0).flatten(1) for x in (x_hat, reference))
    mean = found.mean(dim=1, keepdim=True)
    a, b = found - mean, wanted - mean
    floor = SMALL * wanted.square().mean(dim=1, keepdim=True).sqrt()
    weight = 1 + 1 / wanted.abs().maximum(floor).clamp(min=1e-12).square()
    below = (weight * a * a).sum(dim=1)
    gain = torch.where(below > 0, (weight * a * b).sum(dim=1) / below, 1.0).clamp(*LIMITS)
    return torch.stack([mean[:, 0] * (1 - gain), gain], dim=1).float()


@dataclass
class SampleCompensation:
    """VC of the sample itself, a `callback_on_step_end` for diffusers' pipelines.

    compensation = SampleCompensation.fit(
        lambda callback: full_pipe(…, callback_on_step_end=callback),
        lambda callback: fast_pipe(…, callback_on_step_end=callback),
    )
    fast_pipe(…, callback_on_step_end=compensation)

    Attributes:
        corrections: For each step float32 (C, 2), shift and gain.
    """

    corrections: list[Tensor] = field(default_factory=list)

    @classmethod
    def fit(
        cls,
        full: Callable[[Callable[..., dict[str, Any]]], Any],
        compressed: Callable[[Callable[..., dict[str, Any]]], Any],
    ) -> "SampleCompensation":
        """Measures both runs; each step's correction is found with those before it active.

        Args:
            full: Runs the full model with the callback that it is given, from fixed seeds.
            compressed: Runs the compressed one from the same seeds, with as many steps.

        Raises:
            OptionError: the runs have different numbers of steps, or never called back.
        """
        wanted: list[Tensor] = []
        fitted = cls()

        def record(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            wanted.append(values["latents"].detach().clone())
            return values

        def correct(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step >= len(wanted):
                raise OptionError(f"the compressed run has more than the {len(wanted)} steps of the full one")
            fitted.corrections.append(fit_correction(values["latents"], wanted[step]))
            return fitted(pipe, step, timestep, values)

        full(record)
        compressed(correct)
        if len(fitted.corrections) != len(wanted) or not wanted:
            raise OptionError(
                f"the full run called back {len(wanted)} times, the compressed one {len(fitted.corrections)}: "
                "expected as many steps in both, and callback_on_step_end passed on"
            )
        return fitted

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Corrects `values["latents"]` of one step; what diffusers calls at its end.

        Raises:
            OptionError: a step that was not measured.
        """
        if step >= len(self.corrections):
            raise OptionError(f"step {step + 1} of a compensation for {len(self.corrections)} steps: fit it again")
        latents = values["latents"]
        return values | {"latents": compensate(latents, self.corrections[step].to(latents.device))}
