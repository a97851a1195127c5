from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import qc_compiler
from qc_compiler.calibration import planning
from qc_compiler.calibration.recording import by_sample
from qc_compiler.calibration.samples import Calls
from qc_compiler.calibration.schedule import relative_error, schedules_of
from qc_compiler.errors import OptionError, QuantCacheError
from qc_compiler.options import parse_options
from qc_compiler.plan import Plan
from qc_compiler.registry import runtime_of
from small_blocks import Modulated, Stack
from tiny_models import compile_eagerly, eager_backend, guided, sample, tiny_dit

STEPS = 6
SITES = [f"blocks.0.{part}" for part in ("attn.qkv", "attn.out", "mlp.0", "mlp.2")]


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


def generate(model):
    return sample(model, STEPS)


def calibrated(model, share=None, generate=generate, **options):
    options = {"budget": 3, "level": "output", "samples": 6, "emulate": True} | options
    return qc_compiler.calibrate(model, generate, share, progress=False, backend=backend, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_dit(1)


@pytest.fixture(scope="module", params=["importance", "dmpq", "w4a8+balance"])
def plan(request, model):
    share = 0.5 if request.param == "dmpq" else None
    found = calibrated(model, share, quantize=request.param, compensate=True, bits=6.0)
    torch._dynamo.reset()
    return found


# -- what a plan holds


def test_a_plan_knows_all_linears(plan):
    known = plan.quantization
    assert list(known.sites) == SITES
    assert known.regions == ("output", "network", "blocks.0")
    assert (known.noise > 0).all()
    if known.recipe == "importance":
        assert set(known.bits.tolist()) == {4, 8}
    elif known.recipe == "dmpq":
        assert (known.alpha != 1).all()
        assert known.threshold != 0.5
        assert known.noise[0, 0] > known.noise[1, 0]
    else:
        assert [len(amax) for amax in known.amax] == [32, 32, 32, 64]


def test_a_plan_corrects_every_step_and_channel(plan):
    assert plan.compensation.shape == (1, STEPS, 8, 2)
    assert plan.num_steps == STEPS
    assert not np.allclose(plan.compensation, [0, 1], atol=1e-3)


def test_a_plan_survives_its_file_and_its_compensation_lowers_the_error(model, plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    loaded = Plan.load(tmp_path / "plan.safetensors")
    for name in ("compute", "weights", "compensation"):
        assert np.array_equal(getattr(loaded, name), getattr(plan, name))
    planned = compile_eagerly(model, {"cache": "off", "emulate": True, "plan": loaded})
    found, reference = generate(planned), generate(model)
    runtime = runtime_of(planned)
    assert runtime.options.quantize == plan.quantization.recipe
    assert runtime.interface.num_channels == 8
    (stream,) = qc_compiler.summary(planned).streams
    if plan.has_schedule:
        # the rule reads the statistics of blocks, which the graph has and the plan does not steer
        assert plan.regions == ("output",)
        assert stream.computed.shape == (STEPS, 2)
        assert (stream.computed == plan.compute[0]).all()
        assert ((stream.precision == -1).all(axis=1) == ~plan.compute[0, :, 0]).all()
        assert (stream.precision[0] == 1).all()  # nothing is known yet
    else:
        assert stream.computed.all()
    qc_compiler.configure(planned, plan=replace(loaded, compensation=None))
    uncorrected = generate(planned)
    assert 0 < (found - reference).norm() < (uncorrected - reference).norm()


# -- together


def test_quantization_is_measured_on_the_cached_trajectory(model, monkeypatch):
    seen = []
    original = Calls.pairs
    monkeypatch.setattr(planning.Calls, "pairs", lambda calls, *args: seen.append(calls) or original(calls, *args))
    plan = calibrated(model, 0.5, quantize="w8a8")
    (calls,) = seen
    assert plan.has_schedule
    assert [call.step for call in calls.calls] == np.flatnonzero(plan.compute[0, :, 0]).tolist()
    assert len(calls.calls) == STEPS // 2


def test_every_stream_is_corrected_by_itself(model):
    def guided(m):
        with torch.no_grad():
            x, found = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), []
            for step in range(STEPS):
                t = torch.full((2,), 1000.0 * (1 - step / STEPS))
                found += [m(x, t), m(0.5 * x, t)]
                x = x - (2 * found[-2] - found[-1]) / STEPS
        return torch.stack(found)

    plan = calibrated(model, 0.5, generate=guided, compensate=True)
    assert plan.streams == ("0", "1")
    assert plan.compensation.shape == (2, STEPS, 8, 2)
    assert not np.allclose(*plan.compensation)
    assert guided(compile_eagerly(model, {"plan": plan})).isfinite().all()


def test_without_quantization_and_schedule_there_is_nothing_to_correct(model):
    plan = calibrated(model, compensate=True)
    assert plan.quantization is None
    assert np.allclose(plan.compensation, [0, 1], atol=1e-6)


# -- mistakes


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Stack(Modulated(8))

    def forward(self, x, timestep):
        return self.inner(x + timestep[:, None, None].sin())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "leave nothing to calibrate"),
        ({"quantize": "importnace"}, "did you mean 'importance'"),
        ({"quantize": "w8a8", "selection": "tapp"}, "did you mean 'tap'"),
        ({"quantize": "importance", "bits": 3.0}, "bits=3.0: expected a number from 4 to 16"),
        ({"quantize": "w8a8", "samples": 0}, "samples=0"),
    ],
)
def test_a_wrong_argument_is_an_error(model, options, message):
    with pytest.raises(OptionError, match=message):
        calibrated(model, **options)


def test_a_plan_for_another_recipe_is_refused(model):
    """Its noise and its bits are those of other formats."""
    plan = calibrated(model, quantize="w8a8", samples=2)
    with pytest.raises(OptionError, match="'dmpq': the plan's linears were measured for 'w8a8'"):
        parse_options({"plan": plan, "quantize": "dmpq"})
    assert parse_options({"plan": plan}).quantize == "w8a8"


def test_a_model_without_linears_to_quantize_is_an_error():
    with pytest.raises(QuantCacheError, match=r"no linear .* can be quantized"):
        calibrated(Narrow().eval().requires_grad_(False), quantize="importance")


def test_a_run_that_does_not_repeat_itself_is_an_error(model):
    counts = iter(range(4, 100))
    with pytest.raises(QuantCacheError, match="did not repeat the steps"):
        calibrated(model, generate=lambda m: sample(m, next(counts)), compensate=True, quantize=None)


def test_a_single_step_cannot_be_compared(model):
    with pytest.raises(QuantCacheError, match="computed fewer than two steps"):
        calibrated(model, generate=lambda m: sample(m, 1), quantize="w8a8")


def test_a_generate_that_samples_twice_is_an_error():
    def twice(model):
        return torch.cat([sample(model, 6), sample(model, 6, seed=1)])

    for kwargs in ({"share": 0.5, "budget": 1}, {"share": None, "compensate": True}):
        with pytest.raises(
            QuantCacheError, match="sampled more than once: after 6 steps the timestep turned back.*one batch"
        ):
            qc_compiler.calibrate(tiny_dit(2), twice, progress=False, backend=backend, **kwargs)


def test_skipped_steps_are_fitted_anew_to_what_is_compressed():
    model = tiny_dit(2)
    schedule = calibrated(model, 0.5, guided)
    both = calibrated(model, None, guided, plan=schedule, quantize="w4a6")
    naive = replace(both, weights=schedule.weights, across=schedule.across)
    assert np.array_equal(both.compute, schedule.compute)
    full = by_sample(guided(model))
    options = {"emulate": True}
    errors = [
        relative_error(by_sample(guided(compile_eagerly(model, options | {"plan": plan}))), full)
        for plan in (both, naive)
    ]
    assert 0.5 * both.measured["error"] < errors[0] < both.measured["error"]  # of samples not fitted to
    assert errors[0] < 0.95 * errors[1]


def test_the_schedules_of_a_plan_are_those_it_was_made_of():
    schedules = (((0, ()), (2, (1,)), (5, ())), ((0, ()), (3, (2,))))
    compute = np.zeros((2, 6, 3), dtype=np.bool_)
    for rows, schedule in zip(compute, schedules):
        for step, blocks in schedule:
            rows[step, [0, *(blocks or (1, 2))]] = True
    plan = Plan(
        "", "output+block", ("output", "a", "b"), tuple(range(6, 0, -1)), compute, np.zeros((2, 6, 3, 1)), ("0", "1")
    )
    assert schedules_of(plan) == schedules
