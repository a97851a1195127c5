import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from qc_compiler.compensation import LIMITS, SMALL, SampleCompensation, channel_axis, compensate, fit_correction
from qc_compiler.errors import OptionError

SHAPES = pytest.mark.parametrize("shape", [(3, 50, 5), (2, 5, 8, 8), (2, 5, 3, 6, 6)])  # five channels each


def pair(shape, seed=0, mean=0.0):
    """Returns a reference and what a compressed model might make of it."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(shape, generator=generator) + mean
    return 0.85 * reference + 0.1 * torch.randn(shape, generator=generator) + 0.05, reference


def channels(x):
    return x.double().movedim(channel_axis(x.dim()), 0).flatten(1).numpy()


def objective(gain, x_hat, reference):
    """Σ (x̃ − x')² + Σ ((x̃ − x')/x')² of one channel, as the module's docstring states it."""
    mean = x_hat.mean()
    error = mean + gain * (x_hat - mean) - reference
    floor = SMALL * np.sqrt(np.square(reference).mean())
    return np.square(error).sum() + np.square(error / np.maximum(np.abs(reference), floor)).sum()


# -- the fit


@SHAPES
@pytest.mark.parametrize("mean", [0.0, 0.5, -3.0])
def test_the_gain_minimizes_the_weighted_error_of_each_channel(shape, mean):
    x_hat, reference = pair(shape, mean=mean)
    correction = fit_correction(x_hat, reference)
    assert correction.shape == (5, 2)
    assert correction.dtype == torch.float32
    for (shift, gain), found, wanted in zip(correction.tolist(), channels(x_hat), channels(reference)):
        best = minimize_scalar(
            objective, args=(found, wanted), bounds=LIMITS, method="bounded", options={"xatol": 1e-9}
        )
        assert gain == pytest.approx(best.x, rel=1e-5)
        assert shift == pytest.approx(found.mean() * (1 - gain), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("mean", "expected"), [(0.0, True), (0.5, False)])
def test_a_gain_that_takes_the_mean_for_zero_is_right_there_only(mean, expected):
    """b = x' in place of x' − μ."""
    x_hat, reference = pair((1, 1, 40, 40), mean=mean)
    x_hat = x_hat - x_hat.mean() + mean
    ((found,), (wanted,)) = channels(x_hat), channels(reference)
    a = found - found.mean()
    weight = 1 + 1 / np.maximum(np.abs(wanted), SMALL * np.sqrt(np.square(wanted).mean())) ** 2
    printed = (weight * a * wanted).sum() / (weight * a * a).sum()
    ours = float(fit_correction(x_hat, reference)[0, 1])
    assert (abs(ours - printed) < 1e-4) == expected
    costs = [objective(gain, found, wanted) for gain in (ours, printed)]
    assert (costs[1] > 1.01 * costs[0]) != expected, costs


@pytest.mark.parametrize(("factor", "gain"), [(0.1, 2.0), (10.0, 0.5), (0.8, 1.25), (-1.0, 0.5)])
def test_the_gain_is_clamped(factor, gain):
    reference = pair((2, 3, 8, 8))[1]
    assert torch.allclose(fit_correction(factor * reference, reference)[:, 1], torch.tensor(gain), atol=0.02)


def test_what_does_not_vary_is_left_alone():
    x_hat, reference = pair((2, 3, 4, 4))
    x_hat[:, 1] = 7.0
    correction = fit_correction(x_hat, reference)
    assert correction[1].tolist() == [0.0, 1.0]
    assert torch.equal(compensate(x_hat, correction)[:, 1], x_hat[:, 1])
    assert (correction[[0, 2], 1] != 1).all()


def test_a_reference_of_zeros_gives_finite_numbers():
    correction = fit_correction(pair((2, 3, 4, 4))[0], torch.zeros(2, 3, 4, 4))
    assert correction.isfinite().all()


def test_elements_near_zero_do_not_outweigh_the_rest():
    x_hat, reference = pair((1, 1, 32, 32))
    before = fit_correction(x_hat, reference)
    reference[0, 0, 0, 0], x_hat[0, 0, 0, 0] = 1e-9, 0.3
    assert torch.allclose(fit_correction(x_hat, reference), before, atol=0.05)


# -- the correction


@SHAPES
def test_the_mean_of_each_channel_stays_and_the_error_falls(shape):
    x_hat, reference = pair(shape)
    found = compensate(x_hat, fit_correction(x_hat, reference))
    assert found.shape == x_hat.shape
    assert np.allclose(channels(found).mean(axis=1), channels(x_hat).mean(axis=1), atol=1e-5)
    assert (found - reference).norm() < (x_hat - reference).norm()


@SHAPES
def test_each_channel_has_its_own(shape):
    correction = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.5], [0.0, 1.0]])
    x = pair(shape)[0]
    expected = channels(x) * correction[:, 1:].numpy() + correction[:, :1].numpy()
    assert np.allclose(channels(compensate(x, correction)), expected, atol=1e-6)


def test_in_bfloat16_it_is_computed_in_float32_and_rounded_once():
    x_hat, reference = (x.bfloat16() for x in pair((2, 3, 8, 8)))
    correction = fit_correction(x_hat, reference)
    found = compensate(x_hat, correction)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, compensate(x_hat.float(), correction).bfloat16())


# -- the sample, as a callback


class Pipe:
    """A sampling loop that calls back as diffusers does; `damping` stands for what compression does."""

    def __init__(self, damping=1.0, steps=4):
        self.damping, self.steps = damping, steps

    def __call__(self, callback_on_step_end=None):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        x = x - x.mean(dim=(0, 2, 3), keepdim=True)  # the correction keeps the mean, so let damping do so too
        for i in range(self.steps):
            x = self.damping * (x + 0.3 * x.roll(1, -1))
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, 1000 - i, {"latents": x}).pop("latents", x)
        return x


def fitted(full, compressed):
    return SampleCompensation.fit(lambda c: full(callback_on_step_end=c), lambda c: compressed(callback_on_step_end=c))


def test_a_damped_sampler_is_brought_back():
    full, compressed = Pipe(), Pipe(0.9)
    compensation = fitted(full, compressed)
    assert len(compensation.corrections) == 4
    # each step is fitted with those before it active, so each has to undo its own damping only
    for correction in compensation.corrections:
        assert torch.allclose(correction[:, 1], torch.tensor(1 / 0.9), atol=0.01)
    expected = full()
    errors = [(compressed(c) - expected).norm() for c in (None, compensation)]
    assert errors[1] < 0.1 * errors[0]


def test_fitting_leaves_the_full_run_as_it_is():
    full, seen = Pipe(), []
    fitted(lambda callback_on_step_end: seen.append(full(callback_on_step_end)), Pipe(0.9))
    assert torch.equal(seen[0], full())


def test_other_values_of_the_callback_pass_through():
    compensation = fitted(Pipe(), Pipe(0.9))
    values = {"latents": torch.ones(2, 4, 8, 8), "prompt_embeds": torch.ones(1)}
    result = compensation(None, 0, 1000, values)
    assert result["prompt_embeds"] is values["prompt_embeds"]
    assert not torch.equal(result["latents"], values["latents"])
    assert torch.equal(values["latents"], torch.ones(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("full", "compressed", "message"),
    [
        (Pipe(steps=3), Pipe(steps=4), "more than the 3 steps of the full one"),
        (Pipe(steps=4), Pipe(steps=3), "called back 4 times, the compressed one 3"),
        (lambda callback_on_step_end: None, lambda callback_on_step_end: None, "called back 0 times"),
    ],
)
def test_runs_that_do_not_match_are_an_error(full, compressed, message):
    with pytest.raises(OptionError, match=message):
        fitted(full, compressed)


def test_a_step_that_was_not_measured_is_an_error():
    with pytest.raises(OptionError, match="step 5 of a compensation for 4 steps"):
        Pipe(steps=5)(fitted(Pipe(), Pipe(0.9)))


@pytest.mark.parametrize(("name", "expected"), [("flux/pipeline_flux.py", True), ("dit/pipeline_dit.py", False)])
def test_diffusers_calls_back_with_these_arguments(name, expected):
    """DiT's pipeline is older than callbacks."""
    source = (Path(diffusers.__file__).parent / "pipelines" / name).read_text()
    assert ("callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)" in source) == expected
    assert ('latents = callback_outputs.pop("latents", latents)' in source) == expected
    names = list(inspect.signature(SampleCompensation.__call__).parameters)
    assert names == ["self", "pipe", "step", "timestep", "values"]
