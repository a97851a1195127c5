import copy
import itertools

import numpy as np
import pytest
import torch

from capture import capture
from qc_compiler.allocation import WIDTHS
from qc_compiler.calibration.importance import Measurement, _line, measure
from qc_compiler.calibration.sites import SiteRunner
from qc_compiler.formats.schemes import PLAIN, SCHEMES, Scheme
from qc_compiler.plan import OUTLIER_RATIO
from qc_compiler.registry import runtime_of
from qc_compiler.statistics import Statistic
from tiny_models import TinyDiT, compile_eagerly, tiny_dit

W4A8, W8A8 = SCHEMES["w4a8"], SCHEMES["w8a8"]


def important():
    """A tiny DiT of which one linear obviously matters most: what it adds is a hundred times larger."""
    model = tiny_dit(2)
    with torch.no_grad():
        model.blocks[1].mlp[2].weight.mul_(100)
    return model


@pytest.fixture(scope="module")
def states():
    """Two samples at each of three steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 8, generator=generator)
    step = 0.2 * torch.randn(2, 16, 8, generator=generator)
    return [(x + i * step, torch.full((2,), 900.0 - 100 * i)) for i in range(3)]


def measured(model, states):
    captured = capture(model, *states[0])
    by_id = [next((i for i, s in enumerate(states[0]) if s is value), None) for value in captured.inputs]
    batches = [tuple(x if i is None else s[i] for i, x in zip(by_id, captured.inputs)) for s in states]
    return SiteRunner(captured.shared()), list(itertools.pairwise(batches))


@pytest.fixture(scope="module")
def setting(states):
    runner, pairs = measured(important(), states)
    torch._dynamo.reset()
    return Measurement(runner, pairs)


# -- sensitivity and bits


def test_the_linear_that_matters_most_has_the_largest_score(setting):
    scores = setting.sensitivity(W8A8)
    assert max(scores, key=lambda name: scores[name][0]) == "blocks.1.mlp.2"
    for score in scores.values():
        assert score[WIDTHS.index(4)] > score[WIDTHS.index(8)] > score[WIDTHS.index(16)] == 0


def test_it_gets_the_most_bits(setting):
    """It holds an eighth of the weights, so 4.5 bits pay for eight bits there and four elsewhere."""
    known = measure(setting, "importance", 4.5)
    bits = dict(zip(known.sites, known.bits.tolist()))
    assert bits.pop("blocks.1.mlp.2") == 8
    assert set(bits.values()) == {4}
    richer = measure(setting, "importance", 6.0)
    sizes = np.array([setting.weights[name].numel() for name in known.sites])
    assert 4.5 * sizes.sum() < richer.bits @ sizes <= 6.0 * sizes.sum()


def test_a_score_is_the_product_of_its_terms(setting):
    parts = [setting.sensitivity(W8A8, (term,)) for term in ("numerical", "perceptual", "temporal")]
    together = setting.sensitivity(W8A8, ("numerical", "perceptual", "temporal"))
    for name, score in together.items():
        assert score[:2] == pytest.approx(parts[0][name][:2] * parts[1][name][:2] * parts[2][name][:2], rel=1e-5)
    assert all((part[:2] >= 1).all() and (part[:2] <= 39.01).all() for part in parts[2].values())


def test_the_perceptual_term_is_the_error_of_the_prediction(setting):
    site = setting.sites[0]
    runs = setting.quantized_runs(lambda other: W4A8 if other is site else None)
    ratios = [
        ((a.output - b.output).flatten(1).norm(dim=1) / b.output.flatten(1).norm(dim=1)).square()
        for (a, _), (b, _) in zip(runs, setting.exact)
    ]
    found = setting.sensitivity(W4A8, ("perceptual",))[site.name][WIDTHS.index(4)]
    assert found == pytest.approx(float(torch.cat(ratios).mean()), rel=1e-5)
    assert found > 0


def test_only_the_linears_asked_for_are_rounded(setting):
    assert torch.equal(setting.quantized_runs(lambda _: None)[0][0].output, setting.exact[0][0].output)
    assert not torch.equal(setting.quantized_runs(lambda _: W4A8)[0][0].output, setting.exact[0][0].output)


# -- DMPQ


@pytest.mark.parametrize("seed", range(3))
def test_a_line_is_that_of_least_squares(seed):
    x, y = np.random.default_rng(seed).normal(size=(2, 20))
    assert _line(x, y) == pytest.approx(tuple(np.polyfit(x, y, 1)), rel=1e-6)


def test_a_line_through_one_value_of_x_is_flat():
    assert _line(np.full(5, 2.0), np.arange(5.0)) == (0.0, 2.0)


def test_the_prediction_is_fitted_to_the_errors_of_the_next_step(setting):
    known = measure(setting, "dmpq", 6.0)
    later = torch.cat([true.output for _, true in setting.exact]).flatten(1).norm(dim=1)
    gammas, predicted, errors = setting.gammas(), [], {}
    for site, alpha, beta in zip(setting.sites, known.alpha, known.beta):
        low, high = (
            (setting.output_errors(site, Scheme("nvfp4", form))[1].flatten(1).norm(dim=1) / later).numpy()
            for form in ("nvfp4", "uint8")
        )
        errors[site.name] = np.sqrt(np.maximum(low**2 - high**2, 0))
        slope, intercept = np.polyfit(gammas[site.block], errors[site.name], 1)
        assert (alpha, beta) == pytest.approx((slope, intercept), rel=1e-3, abs=1e-6)
        predicted += (alpha * gammas[site.block] + beta).tolist()
    # of six bits half of the linears have four, half eight
    assert np.mean(np.array(predicted) <= known.threshold) == pytest.approx(0.5, abs=0.05)
    assert max(map(np.max, errors.values())) > 0


@pytest.mark.parametrize(("mean_bits", "share"), [(8.0, 0.0), (4.0, 1.0)])
def test_the_threshold_follows_the_bits(setting, mean_bits, share):
    known = measure(setting, "dmpq", mean_bits)
    gammas = setting.gammas()
    predicted = np.stack([a * gammas[s.block] + b for s, a, b in zip(setting.sites, known.alpha, known.beta)])
    assert np.mean(predicted <= known.threshold + 1e-6) == pytest.approx(share, abs=0.05)


def test_local_errors_are_those_of_the_format(setting):
    for site in setting.sites:
        errors = setting.local_errors(site, W8A8)
        assert len(errors) == 4  # two pairs of two samples
        assert (errors > 0).all()
        assert (errors < 0.02).all()
        assert (setting.local_errors(site, W4A8) > errors).all()


class Folded(TinyDiT):
    """Its blocks see the two halves of a sample side by side in the batch, as they would see the frames of a video."""

    def forward(self, x, timestep):
        temb = self.time(torch.stack([timestep.sin(), timestep.cos()], dim=-1).repeat(1, 8)).repeat_interleave(2, 0)
        x = self.embed(x).unflatten(1, (2, -1)).flatten(0, 1)
        for block in self.blocks:
            x = block(x, temb)
        return self.head(x.unflatten(0, (-1, 2)).flatten(1, 2))


def test_blocks_that_fold_frames_into_their_batch(states):
    runner, pairs = measured(Folded(2).eval().requires_grad_(False), states)
    known = measure(Measurement(runner, pairs), "dmpq", 5.0)
    gammas = Measurement(runner, pairs).gammas()
    assert {name: values.shape for name, values in gammas.items()} == dict.fromkeys(gammas, (4,))
    assert len(known.sites) == 8
    assert np.isfinite(known.alpha).all()


def test_gammas_are_the_statistic_that_the_runtime_measures(states):
    model = important()
    single = [(x[:1], t[:1]) for x, t in states]
    runner, pairs = measured(model, single)
    gammas = Measurement(runner, pairs).gammas()
    compiled = compile_eagerly(model, {"cache": "static", "interval": 1, "level": "block"})
    with torch.no_grad():
        for state in single:
            compiled(*state)
    steps = [step.resolve().statistics for step in runtime_of(compiled).trajectories[-1].streams[0].steps]
    for r, name in enumerate(("blocks.0", "blocks.1")):
        assert gammas[name] == pytest.approx([steps[i][r, Statistic.GAMMA] for i in (0, 1)], rel=1e-4)


# -- outliers


def test_outliers_are_found_and_get_a_third_precision(states):
    model = tiny_dit(2)
    with torch.no_grad():  # one channel of an MLP's hidden layer
        model.blocks[0].mlp[0].bias[5] = 300.0
    runner, pairs = measured(model, states)
    known = measure(Measurement(runner, pairs), "dmpq", 5.0)
    ratios = dict(zip(known.sites, known.ratios.tolist()))
    assert [name for name, ratio in ratios.items() if ratio > OUTLIER_RATIO] == ["blocks.0.mlp.2"]
    assert len(known.noise) == 3
    (hidden,) = [Measurement(runner, pairs).amax["blocks.0.mlp.2"]]
    assert hidden.argmax() == 5
    assert hidden.max() == pytest.approx(300, rel=0.05)


def test_without_outliers_there_are_two(setting):
    assert len(measure(setting, "dmpq", 5.0).noise) == 2


def test_ranges_are_kept_where_balancing_needs_them(setting):
    known = measure(setting, "w4a8+balance", 5.0)
    assert [len(amax) for amax in known.amax] == [setting.weights[name].shape[1] for name in known.sites]
    assert all(np.array_equal(a, setting.amax[name].numpy()) for a, name in zip(known.amax, known.sites))
    assert measure(setting, "w4a8", 5.0).amax == ()


# -- the noise floor


def test_there_is_no_noise_where_nothing_is_quantized(setting):
    noise = setting.noise(lambda _: None)
    assert list(noise) == ["output", "network", "blocks.0", "blocks.1"]
    assert set(noise.values()) == {0.0}


def test_fewer_bits_make_more_noise(setting):
    schemes = [Scheme("int8", PLAIN), W8A8, Scheme("int4/128", "uint8"), Scheme("int4/128", "uint4")]
    noises = [setting.noise(lambda _, s=scheme: s) for scheme in schemes]
    for name in ("output", "network", "blocks.0", "blocks.1"):
        values = [noise[name] for noise in noises]
        assert values == sorted(values)
        assert values[0] > 0
        assert values[-1] > 3 * values[1]


def test_noise_that_stays_as_it_is_does_not_make_a_change_appear(setting):
    """The floor is of the difference between two steps: of equal inputs there is none, however coarse the format."""
    still = Measurement(setting.runner, [(now, now) for now, _ in setting.pairs])
    assert set(still.noise(lambda _: W4A8).values()) == {0.0}


def test_noise_is_what_the_runtime_would_measure_between_two_steps(states):
    """Quantized and exact residuals of a block, as CHANGE compares them: mean|n − n'| / mean|Δ|."""
    model = tiny_dit(1)
    runner, pairs = measured(model, states)
    found = Measurement(runner, pairs[:1]).noise(lambda _: W4A8)
    residuals = []
    for options in ({}, {"quantize": "w4a8", "emulate": True}):
        compiled = compile_eagerly(copy.deepcopy(model), {"cache": "static", "interval": 1, "level": "block"} | options)
        with torch.no_grad():
            for state in states[:2]:
                compiled(*state)
                ((delta,),) = [slots[0][1] for slots in runtime_of(compiled).trajectories[-1].streams[0].history]
                residuals.append(delta.clone())
    a, a2, q, q2 = residuals
    assert found["blocks.0"] == pytest.approx(float(((q2 - a2) - (q - a)).abs().mean() / a.abs().mean()), rel=0.02)
