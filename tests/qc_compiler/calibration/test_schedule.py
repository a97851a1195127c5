import copy
import functools
import itertools

import numpy as np
import pytest
import torch

import qc_compiler
from qc_compiler.calibration.recording import COMPUTE_ALL, Recording, by_sample, compile_static, run_steered
from qc_compiler.calibration.schedule import (
    DEPTH,
    LUCK,
    ROUNDING,
    ClosedLoop,
    ScheduleSearch,
    exchanges,
    moves,
    relative_error,
    residual,
    schedules_of,
    shortest_path,
    starts,
    uneven,
    whole_steps,
)
from qc_compiler.graph import RegionSpec
from qc_compiler.runtime import GuardedGraph
from tiny_models import compile_eagerly, eager_backend, guided, sample, tiny_dit

STEPS = 12


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


@pytest.fixture(scope="module")
def model():
    return tiny_dit()


@pytest.fixture(scope="module")
def plan(model):
    return qc_compiler.calibrate(
        model, lambda m: sample(m, STEPS), share=0.5, budget=5, level="output", progress=False, backend=backend
    )


def gram_of(vectors):
    return vectors @ vectors.T


def test_residual_is_the_distance_from_the_span():
    vectors = np.random.default_rng(0).normal(size=(4, 50))
    weights, *_ = np.linalg.lstsq(vectors[[2, 0]].T, vectors[3], rcond=None)
    expected = ((vectors[[2, 0]].T @ weights - vectors[3]) ** 2).sum()
    assert residual(gram_of(vectors), (2, 0), 3) == pytest.approx(expected, rel=1e-3)


def test_a_model_that_predicts_zeros_is_skipped_without_error():
    """As diffusion transformers do before they are trained: their last layer begins at zero."""
    model = tiny_dit(1)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    plan = qc_compiler.calibrate(
        model, lambda m: 1 + sample(m, 6), share=0.5, budget=2, progress=False, backend=backend
    )
    assert plan.measured["error"] == 0.0


def test_shortest_path_with_depth_two_is_the_optimum():
    gram = gram_of(np.random.default_rng(1).normal(size=(8, 5)).cumsum(axis=0))

    def cost(path):
        known = ([c for c in reversed(path) if c < i][:2] for i in range(8) if i not in path)
        return sum(residual(gram, k, i) for k, i in zip(known, (i for i in range(8) if i not in path)))

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 8), 3)), key=cost)
    assert cost(shortest_path(gram, 4, 2)) == pytest.approx(cost(best))


def test_every_start_computes_step_0_and_as_many_steps_as_asked():
    gram = gram_of(np.random.default_rng(2).normal(size=(20, 6)).cumsum(axis=0))
    for bare in ([0], [0, 1]):
        for steps in starts(gram, 6, bare):
            assert [*steps[: len(bare)]] == bare
            assert len(set(steps)) == 6
            assert steps[-1] < 20


def work(schedules):
    return sum(len(blocks) / 4 if blocks else 1 for schedule in schedules for _, blocks in schedule)


@pytest.mark.parametrize("schedules", [[[0, 4, 9, 15]], [[0, 4, 9, 15], [0, 9]]])
def test_moves_and_exchanges_keep_the_work(schedules):
    schedules = tuple(map(whole_steps, schedules))
    regions = [RegionSpec("output", -1, 0.0), *(RegionSpec(f"blocks.{i}", 0, 1.0) for i in range(4))]
    found = list(moves(schedules, 20))
    assert len(found) == len(set(found)) >= 18
    found += exchanges(schedules, 20, regions)
    assert all(work(changed) == work(schedules) and changed != schedules for changed in found)
    assert all(schedule[0] == (0, ()) for changed in found for schedule in changed)
    assert all(0 <= step < 20 for changed in found for schedule in changed for step, _ in schedule)


def test_streams_give_steps_to_each_other_and_move_together():
    before = tuple(map(whole_steps, ([0, 4, 9], [0, 4])))
    sizes = {tuple(map(len, changed)) for changed in moves(before, 12)}
    assert sizes == {(3, 2), (2, 3), (4, 1)}
    assert tuple(map(whole_steps, ([0, 5, 9], [0, 5]))) in list(moves(before, 12))


def test_steps_with_nothing_to_reuse_stay_computed():
    before, bare = tuple(map(whole_steps, ([0, 1, 9, 15], [0, 1, 4]))), [0, 1]
    regions = [RegionSpec("output", -1, 0.0), *(RegionSpec(f"blocks.{i}", 0, 1.0) for i in range(4))]
    found = [*moves(before, 20, bare), *exchanges(before, 20, regions), *uneven([0, 1, 9, 15], 4, 20, 2, bare)]
    assert all(schedule[:2] == ((0, ()), (1, ())) for changed in found for schedule in changed)
    assert all(work(changed) in (7, 8) for changed in found)


def test_uneven_shares_spend_as_much_on_one_stream_more():
    assert uneven([0, 4, 9, 15], 4, 20, 1) == []
    for schedules in uneven([0, 2, 4, 6, 9, 11, 13, 15, 17, 19], 10, 20, 2):
        assert work(schedules) == 20
        assert sorted(map(len, schedules)) in ([8, 12], [6, 14])
        assert all(schedule[0] == (0, ()) and schedule[-1] == (19, ()) for schedule in schedules)


def euler_recording(weights=(1.0,), steps=4):
    """Returns a recording of x ← x − 0.25·Σ w_s·v_s with random predictions."""
    torch.manual_seed(0)
    xs, vs = [torch.randn(100)], {str(s): [] for s in range(len(weights))}
    for _ in range(steps):
        for predictions in vs.values():
            predictions.append(torch.randn(100))
        xs.append(xs[-1] - 0.25 * sum(w * v[-1] for w, v in zip(weights, vs.values())))
    times = [float(steps - i) for i in range(steps)]
    return Recording(times, dict.fromkeys(vs, xs[:steps]), vs, latent_shape=(5, 20), prediction_shape=(5, 20))


def test_the_samplers_step_is_read_off_the_trajectory():
    recording = euler_recording((2.0, -1.0))
    a, b = recording.sampler_step(1)
    assert (a, *b) == pytest.approx((1.0, -0.5, 0.25), rel=1e-3)
    assert not recording.sampler_step(3)[1].any()  # the last step leads nowhere that was recorded
    for samples in recording.inputs.values():
        samples[2] = torch.randn(100)  # a stochastic sampler
    assert not recording.sampler_step(1)[1].any()


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
def test_the_last_stream_makes_up_for_the_others_and_for_the_deviation(gain):
    recording = euler_recording((2.0, -1.0))
    sample, missed = (recording.inputs["0"][i] + 0.1 * torch.randn(100) for i in (1, 1))
    last = recording.wanted(1, 1, sample, [missed], gain)
    following = sample - 0.25 * (2 * missed - last)
    deviation = sample - recording.inputs["0"][1]
    torch.testing.assert_close(
        following, recording.inputs["0"][2] + ((1 - gain) * deviation).double(), atol=1e-4, rtol=0
    )


def test_guidance_in_one_call_is_a_step_of_both_halves():
    two, one = euler_recording((2.0, -1.0)), euler_recording((2.0, -1.0))
    one.inputs = {"0": [torch.cat([x, x]) for x in one.inputs["0"]]}
    one.outputs = {"0": [torch.cat(both) for both in zip(*one.outputs.values())]}
    one.latent_shape = one.prediction_shape = (10, 20)
    a, b = two.sampler_step(1)
    assert one.sampler_step(1) == pytest.approx((a, b.sum()), rel=1e-3)
    sample = two.inputs["0"][1] + 0.1 * torch.randn(100)
    cond, uncond = one.wanted(0, 1, torch.cat([sample, sample]), [], 0.3).chunk(2)
    following = sample - 0.25 * (2 * cond - uncond)
    expected = two.inputs["0"][2] + 0.7 * (sample - two.inputs["0"][1])
    torch.testing.assert_close(following, expected.double(), atol=1e-4, rtol=0)


def test_variances_beside_the_prediction_are_left_as_they_were_recorded():
    recording, sample, missed = euler_recording((2.0, -1.0)), torch.randn(100), torch.randn(100)
    expected = recording.wanted(1, 1, sample, [missed], 0.3).view(5, 20)
    variances = torch.randn(5, 20)
    for outputs in recording.outputs.values():
        outputs[:] = [torch.cat([v.view(5, 20), variances], 1).flatten() for v in outputs]
    recording.latent_shape, recording.prediction_shape = (5, 20), (5, 40)
    missed = torch.cat([missed.view(5, 20), torch.zeros(5, 20)], 1).flatten()
    found = recording.wanted(1, 1, sample, [missed], 0.3).view(5, 40)
    torch.testing.assert_close(found, torch.cat([expected, variances], 1), atol=1e-4, rtol=0)
    recording.prediction_shape = (5, 8, 5)
    assert torch.equal(recording.wanted(1, 1, sample, [missed], 0.3), recording.outputs["1"][1].double())


@pytest.mark.parametrize("width", [10, 20, 30])
@pytest.mark.parametrize("is_before", [False, True])
def test_an_image_given_beside_the_sample_does_not_move_it(width, is_before):
    recording, sample, image = euler_recording(), torch.randn(100), torch.randn(5, width)
    expected = recording.wanted(0, 1, sample, [], 0.3)

    def beside(x):
        return torch.cat([image, x.view(5, 20)] if is_before else [x.view(5, 20), image], 1).flatten()

    recording.inputs["0"] = [beside(x) for x in recording.inputs["0"]]
    recording.latent_shape, recording.prediction_shape = (5, 20 + width), (5, 20)
    torch.testing.assert_close(recording.wanted(0, 1, beside(sample), [], 0.3), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_before", [False, True])
def test_rows_of_one_sample_are_found_beside_an_image(is_before):
    """Of guidance in one call: the unconditional half is given zeros instead."""
    x, image = torch.randn(2, 3, 4), torch.cat([torch.ones(3, 4), torch.zeros(3, 4)])
    recording = Recording(latent_shape=(6, 8), prediction_shape=(6, 4))
    steps = [[step.repeat(2, 1), image] for step in x]
    recording.inputs["0"] = [torch.cat(parts[::-1] if is_before else parts, 1).flatten() for parts in steps]
    assert recording.rows_of_samples().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_without_a_known_sampler_the_recorded_prediction_is_wanted():
    recording = euler_recording((2.0, -1.0))
    wanted = recording.wanted(1, 3, torch.randn(100), [torch.randn(100)], 1.0)
    assert torch.equal(wanted, recording.outputs["1"][3].double())


def test_the_error_of_samples_is_the_mean_of_their_psnr():
    reference, broken = torch.ones(2, 50), torch.ones(2, 50)
    assert relative_error(reference, reference) == 0.0
    assert relative_error(reference + torch.tensor([[0.1], [0.001]]), reference) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(reference + torch.tensor([[0.1], [0.0]]), reference) == pytest.approx((0.1 * ROUNDING) ** 0.5)
    broken[1, 3] = torch.nan
    assert relative_error(broken, reference) == np.inf
    assert relative_error(torch.zeros(2, 50), torch.zeros(2, 50)) == 0.0


@pytest.mark.parametrize(("error", "is_better"), [(0.99 * LUCK, True), (1.01 * LUCK, False)])
def test_a_step_is_moved_for_more_than_luck(error, is_better):
    first, other = (whole_steps((0, 4)),), (whole_steps((0, 5)),)
    search = object.__new__(ScheduleSearch)
    search.gain, search.measure = 0.1, lambda schedules, gain: ({first: 1.0, other: error}[schedules], None)
    assert search._improve(first, lambda best: iter([other]), 3) == (other if is_better else first)


def test_a_plan_spends_its_share_and_beats_uniform_reuse(model, plan):
    assert plan.compute[0, :, 0].sum() == STEPS // 2
    assert plan.measured["share"] == 0.5
    reference = sample(model, STEPS, seed=5)
    planned = compile_eagerly(model, {"plan": plan})
    uniform = compile_eagerly(model, {"cache": "static", "interval": 2, "level": "output", "cache_order": 1})
    errors = [float((sample(m, STEPS, seed=5) - reference).norm()) for m in (planned, uniform)]
    assert errors[0] < errors[1]
    assert qc_compiler.summary is not None


@pytest.fixture(scope="module")
def guided_plan(model):
    return qc_compiler.calibrate(model, guided, 0.4, budget=12, level="output", progress=False, backend=backend)


def test_streams_are_computed_at_steps_of_their_own(guided_plan):
    cond, uncond = guided_plan.compute[..., 0]
    assert cond.sum() + uncond.sum() in (9, 10)  # of an uneven share two may fall together
    assert cond.tolist() != uncond.tolist()
    assert cond[0]
    assert uncond[0]
    assert guided_plan.across[~guided_plan.compute[..., 0]].any(axis=1).all()
    assert not guided_plan.across[guided_plan.compute[..., 0]].any()


def fitted_to(model, generate, schedules):
    """Returns the plan of these schedules, fitted to the samples of `generate`."""
    torch._dynamo.reset()
    compiled = compile_static(model, backend, COMPUTE_ALL | {"cache_order": DEPTH - 1})
    recording = Recording()
    reference = run_steered(compiled, generate, recording)
    return ScheduleSearch(compiled, generate, recording, reference).plan(schedules)


def guided_in_one_call(model, rows=(0, 1, 2), other=1.0):
    """As `guided`, of three samples in one batch with what the second stream sees of them."""
    x = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(4))[list(rows)]
    with torch.no_grad():
        for i in range(STEPS):
            cond, uncond = model(torch.cat([x, other * x]), torch.full((2 * len(x),), 1000 * (1 - i / STEPS))).chunk(2)
            x = x - (uncond + 2 * (cond - uncond)) / STEPS
    return x


def test_what_calibration_measured_is_what_the_plan_gives(model, guided_plan):
    generate = functools.partial(guided, rows=slice(1))
    plan = fitted_to(model, generate, schedules_of(guided_plan))
    compiled, reference = compile_eagerly(model, {"plan": plan}), generate(model)
    error = relative_error(by_sample(generate(compiled)), by_sample(reference))
    assert error == pytest.approx(plan.measured["error"], rel=1e-3)
    streams = qc_compiler.summary(compiled).streams
    assert all((s.computed[:, 0] == row[:, 0]).all() for s, row in zip(streams, plan.compute, strict=True))


def test_samples_are_judged_by_weights_that_were_fitted_to_others(model, guided_plan):
    reference = by_sample(guided(model))
    found = torch.empty_like(reference)
    for judged, others in ((0, slice(1, 2)), (1, slice(1))):
        plan = fitted_to(model, functools.partial(guided, rows=others), schedules_of(guided_plan))
        found[judged] = by_sample(guided(compile_eagerly(model, {"plan": plan})))[judged]
    measured = fitted_to(model, guided, schedules_of(guided_plan)).measured["error"]
    assert measured == pytest.approx(relative_error(found, reference), rel=1e-2)
    own = by_sample(guided(compile_eagerly(model, {"plan": guided_plan})))
    assert relative_error(own, reference) < 0.95 * guided_plan.measured["error"]


def test_samples_are_judged_by_others_in_guidance_of_one_call_too(model):
    schedules, reference = (whole_steps((0, 3, 6, 9)),), by_sample(guided_in_one_call(model))
    found = torch.empty_like(reference)
    for judged, others in (([0, 2], [1]), ([1], [0, 2])):
        plan = fitted_to(model, functools.partial(guided_in_one_call, rows=others), schedules)
        found[judged] = by_sample(guided_in_one_call(compile_eagerly(model, {"plan": plan})))[judged]
    plan = fitted_to(model, guided_in_one_call, schedules)
    own = relative_error(by_sample(guided_in_one_call(compile_eagerly(model, {"plan": plan}))), reference)
    assert plan.measured["error"] == pytest.approx(relative_error(found, reference), rel=1e-2)
    assert abs(plan.measured["error"] / own - 1) > 0.05


def test_a_trial_that_goes_astray_stays_one_run(model):
    torch._dynamo.reset()
    compiled, recording = compile_static(model, backend, COMPUTE_ALL), Recording()
    run_steered(compiled, lambda m: sample(m, 6), recording)

    def astray(m):
        x = torch.ones(1, 16, 8)
        with torch.no_grad():
            for i in range(6):
                m(x * (-10) ** i, torch.full((1,), 1000.0 - i))
        return x

    run_steered(compiled, astray, ClosedLoop(recording, (whole_steps(range(6)),), 1, 0.3))
    assert len(qc_compiler.summary(compiled).streams[0].computed) == 6
    astray(compiled)
    assert len(qc_compiler.summary(compiled).streams[0].computed) == 1  # a user's run, where each is a new one


def test_a_trial_that_had_to_be_computed_is_none(model, monkeypatch):
    def drop(graph, state):
        if isinstance(graph.runtime.pilot, ClosedLoop):
            state.clear_slots()

    monkeypatch.setattr(GuardedGraph, "_drop_bad_slots", drop)
    with pytest.raises(qc_compiler.QuantCacheError, match="not finite where 17% of the steps are computed: spend more"):
        fitted_to(model, guided, (whole_steps((0, 6)),) * 2)


def test_a_run_that_was_given_up_does_not_end_the_calibrated_one(model):
    torch._dynamo.reset()
    compiled, recording = compile_static(model, backend, COMPUTE_ALL), Recording()
    for _ in range(2):
        guided(compiled, num_steps=6)
    run_steered(compiled, guided, recording)
    assert recording.bare_steps == [0]


class WithHint(torch.nn.Module):
    """Is given something more at each step, as by a ControlNet."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, timestep, hint):
        return self.model(x, timestep) + 0.1 * hint


def hinted(model, changes=True):
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for i in range(STEPS):
            hint = torch.full((2, 1, 1), i / STEPS if changes else 0.5)
            x = x - model(x, torch.full((2,), 1000.0 - i), hint) / STEPS
    return x


@pytest.mark.parametrize("changes", [True, False])
def test_what_changes_after_the_first_step_has_the_second_computed(model, changes):
    torch._dynamo.reset()
    generate, recording = functools.partial(hinted, changes=changes), Recording()
    run_steered(compile_static(WithHint(model), backend, COMPUTE_ALL), generate, recording)
    assert recording.bare_steps == ([0, 1] if changes else [0])
    plan = qc_compiler.calibrate(
        WithHint(model), generate, 0.25, budget=6, level="output", progress=False, backend=backend
    )
    computed = plan.compute[0, :, 0]
    assert (computed.sum(), computed[1]) == (3, changes)
    compiled = compile_eagerly(WithHint(model), {"plan": plan})
    error = relative_error(by_sample(generate(compiled)), by_sample(generate(WithHint(model))))
    assert 0 < error <= plan.measured["error"]
    assert (qc_compiler.summary(compiled).streams[0].computed[:, 0] == computed).all()


def with_fresh_noise(model):
    """As a consistency model samples: what it says of the sample is given noise anew."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 8, generator=generator)
    with torch.no_grad():
        for i in range(STEPS):
            x = 0.1 * model(x, torch.full((2,), 1000.0 - i)) + torch.randn(2, 16, 8, generator=generator)
    return x


def with_other_weights(model):
    with torch.no_grad():
        for i in range(STEPS):
            if i == 6:
                model.head.bias.add_(0.1)
            x = torch.ones(2, 16, 8) - 0.01 * model(torch.ones(2, 16, 8), torch.full((2,), 1000.0 - i))
    return x


def with_another_batch(model):
    x = torch.ones(2, 16, 8)
    with torch.no_grad():
        for i in range(STEPS):
            for name, batch in (("guidance", x.repeat(2, 1, 1)), ("perturbed", x)):
                with qc_compiler.stream(name):
                    x = x - 0.01 * model(batch, torch.full((len(batch),), 1000.0 - i))[:2]
    return x


class WithVariances(torch.nn.Module):
    """Predicts as many channels more, as DiT-XL/2 and PixArt do; here of zeros."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return torch.nn.functional.pad(self.model(x, t), (0, 8))


def test_a_model_may_predict_variances_too(model, guided_plan):
    plan = fitted_to(WithVariances(model), lambda m: guided(lambda x, t: m(x, t)[..., :8]), schedules_of(guided_plan))
    assert plan.measured["error"] == pytest.approx(
        fitted_to(model, guided, schedules_of(guided_plan)).measured["error"], rel=1e-3
    )
    np.testing.assert_allclose(plan.weights, guided_plan.weights, atol=1e-3)


def test_where_rows_are_no_samples_the_plan_is_judged_by_its_own(model):
    generate = functools.partial(guided_in_one_call, other=0.9)
    plan = fitted_to(model, generate, (whole_steps((0, 3, 6, 9)),))
    own = relative_error(by_sample(generate(compile_eagerly(model, {"plan": plan}))), by_sample(generate(model)))
    assert plan.measured["error"] == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([6, 5, 7], [[0], [1], [2]]),
        ([6, 5, 6, 5], [[0, 2], [1, 3]]),
        ([6, 6, 5, 5], [[0, 1], [2, 3]]),
        ([6, 6, 5], [[0], [1], [2]]),
        ([5], [[0]]),  # packed tokens
    ],
)
def test_rows_of_one_sample_are_found(rows, expected):
    recording = Recording(inputs={"0": [torch.tensor(rows).repeat_interleave(4).float()]})
    recording.latent_shape = recording.prediction_shape = (len(rows), 4)
    assert recording.rows_of_samples().tolist() == expected


def test_a_plan_survives_its_file(model, plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    planned, loaded = (compile_eagerly(model, {"plan": p}) for p in (plan, str(tmp_path / "plan.safetensors")))
    assert torch.equal(sample(planned, STEPS), sample(loaded, STEPS))


def test_a_plan_for_other_steps_is_refused(model, plan):
    with pytest.raises(Exception, match="none of the plan's 12 steps"):
        sample(compile_eagerly(model, {"plan": plan}), num_steps=7)


@pytest.mark.parametrize(
    ("share", "generate", "message"),
    [
        (0.0, None, "share=0.0"),
        (1.5, None, "share=1.5"),
        (0.5, lambda m: [sample(m, STEPS)], "returned list"),
        (0.5, lambda m: sample(m, 2), "took 2 steps"),
        (0.5, with_fresh_noise, r"more than once: after 1 steps .* \(fresh noise at every step\?\)"),
        (0.5, with_other_weights, "nothing was there to reuse at step 6: the weights"),
        (
            0.5,
            with_another_batch,
            r"stream 'perturbed' with a sample of \(2, 16, 8\), and another one with \(4, 16, 8\)",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_an_error(model, share, generate, message):
    with pytest.raises(qc_compiler.QuantCacheError, match=message):
        qc_compiler.calibrate(copy.deepcopy(model), generate, share=share, budget=1, progress=False, backend=backend)


def test_partial_computation_ends_in_a_plan_that_runs_as_it_says(model):
    plan = qc_compiler.calibrate(
        model, lambda m: sample(m, STEPS), share=0.5, budget=6, progress=False, backend=backend
    )
    assert plan.measured["share"] == pytest.approx(0.5, abs=0.1)
    assert torch.isfinite(sample(compile_eagerly(model, {"plan": plan}), STEPS)).all()
