"""The invariants of the runtime, and what happens to it when things go wrong."""

import gc
import threading
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import qc_compiler
from driver import SHAPE, Driver, noise
from qc_compiler import OptionError, Plan, PlanError, UnsupportedModelError, stream
from qc_compiler.compensation import compensate
from qc_compiler.formats import parse_format
from qc_compiler.graph import Report
from qc_compiler.pipeline import PassRun
from qc_compiler.plan import Quantization
from qc_compiler.registry import runtime_of
from qc_compiler.runtime import _STREAM, MAX_TRAJECTORIES, Pilot
from qc_compiler.statistics import Statistic, Sum
from qc_compiler.trajectory import MAX_STREAMS, PendingStep, Position
from ranks import decide_as_rank
from tiny_models import compile_eagerly, eager_backend, sample, tiny_dit

EVERY_SECOND = {"cache": "static", "interval": 2, "level": "block"}
LONG = {"cache": "static", "interval": 100, "level": "block"}  # after the first step all is reused, if it may be
LEVELS = ["network", "block", "sublayer", "output", "output+block"]


@pytest.fixture
def model():
    return tiny_dit(3)


def plain(model, x, timestep):
    with torch.no_grad():
        return model(x, torch.full((len(x),), float(timestep)))


def assert_computed(result, model, x, timestep):
    torch.testing.assert_close(result, plain(model, x, timestep), rtol=1e-5, atol=1e-6)


def assert_reused(result, model, x, timestep):
    assert not torch.allclose(result, plain(model, x, timestep), atol=1e-4)


# -- where a trajectory begins


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_step_is_computed_and_the_next_may_be_reused(level, model):
    driver, x = Driver(**LONG | {"level": level}), noise()
    assert_computed(driver(x, 1000), model, x, 1000)
    assert_reused(driver(x, 900), model, x, 900)
    assert driver.computed() == [True, False]


@pytest.mark.parametrize("timesteps", [(1000, 900, 800), (0.0, 0.1, 0.2)])
def test_a_timestep_that_turns_back_begins_a_new_trajectory(timesteps, model):
    driver, x = Driver(**LONG), noise()
    for timestep in (*timesteps, timesteps[0]):
        result = driver(x, timestep)
    assert driver.computed() == [True, False, False, True]
    assert_computed(result, model, x, timesteps[0])
    assert len(driver.runtime.trajectories) == 2


def test_steps_out_of_order_begin_a_new_trajectory_each_time_they_turn(model):
    driver, x = Driver(**LONG), noise()
    for timestep in (1000, 900, 950, 960, 850):
        driver(x, timestep)
    assert driver.computed() == [True, False, True, False, True]


def test_new_noise_begins_a_new_trajectory(model):
    driver = Driver(**LONG)
    for seed, timestep in ((0, 1000), (0, 900), (1, 800), (1, 700)):
        result = driver(noise(seed), timestep)
        if timestep == 800:
            assert_computed(result, model, noise(seed), timestep)
    assert driver.computed() == [True, False, True, False]


def test_new_noise_in_the_same_tensor_begins_a_new_trajectory(model):
    driver, x = Driver(**LONG), noise()
    for seed, timestep in [(0, 1000), (1, 900), (2, 800)]:  # it only goes on
        result = driver(x.copy_(noise(seed)), timestep)
        assert_computed(result, model, x, timestep)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_run_given_up_in_its_first_step_leaves_nothing_to_a_run_of_other_noise(calls):
    driver, alone = Driver(**EVERY_SECOND), Driver(**EVERY_SECOND)
    for seed in range(calls):
        driver(noise(seed), 1000)
    found, expected = ([each(noise(9), t) for t in (1000, 900, 800, 700)] for each in (driver, alone))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert driver.computed()[calls:] == alone.computed()


class Captioned(nn.Module):
    """The model with a caption beside the timestep."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, timestep, caption):
        return self.model(x + caption[:, None], timestep)


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("captions", [(0, 1), (2, 1)])
def test_a_run_given_up_in_its_first_step_leaves_nothing_to_the_same_run_begun_again(calls, captions, model):
    """With another caption too: the noise alone does not tell a second run from another stream."""
    torch._dynamo.reset()
    words, x = noise(5, 3, 2, SHAPE[-1]), noise()
    compiled = compile_eagerly(Captioned(model), LONG | {"num_steps": 3})

    def run(captions, timesteps, calls):
        pairs = [(t, caption) for t in timesteps for caption in captions][:calls]
        with torch.no_grad():
            return [compiled(x, torch.full((2,), t), words[caption]) for t, caption in pairs]

    expected = run(captions, (1000.0, 900.0, 800.0), 6)
    qc_compiler.reset(compiled)
    run((0, 1), (1000.0, 900.0), calls)
    found = run(captions, (1000.0, 900.0, 800.0), 6)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_stream_with_nearly_the_same_input_is_none_that_was_begun_again():
    """Guidance by what is in the latent, as of a model that edits images: both go on with one step of the other."""
    driver, found = Driver(**LONG), []
    for t in (1000, 900):
        for factor in (1.0, 0.9):
            found.append(driver(0.95 * factor * noise() if t < 1000 else factor * noise(), t))
    assert driver.computed() == [True, True, False, False]
    assert len(driver.runtime.trajectories) == 1


def test_a_sampler_step_is_no_jump():
    driver, x = Driver(**LONG), noise()
    driver(x, 1000)
    driver(x + 0.7 * noise(1), 900)
    assert driver.computed() == [True, False]


def test_another_batch_size_or_resolution_begins_a_new_trajectory(model):
    compiled = compile_eagerly(model, LONG)
    with torch.no_grad():
        for shape in (SHAPE, (3, *SHAPE[1:]), (SHAPE[0], 20, 8)):
            x, t = noise(0, *shape), torch.full((shape[0],), 1000.0)
            torch.testing.assert_close(compiled(x, t), model(x, t), rtol=1e-5, atol=1e-6)
            assert_reused(compiled(x, t - 100), model, x, 900)


def test_a_change_of_shape_in_mid_trajectory_leaves_the_slots_of_the_other_shape_alone(model):
    compiled = compile_eagerly(model, LONG)
    big, small = noise(0), noise(0, 1, 16, 8)
    alone = Driver(**LONG)
    expected = [alone(big, t) for t in (1000, 900, 700)]
    with torch.no_grad():
        found = [compiled(big, torch.full((2,), t)) for t in (1000.0, 900.0)]
        assert_computed(compiled(small, torch.full((1,), 800.0)), model, small, 800)
        found.append(compiled(big, torch.full((2,), 700.0)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_reset_forgets_everything(model):
    driver, x = Driver(**LONG), noise()
    driver(x, 1000)
    driver.runtime.reset()
    assert driver.slots() == []
    assert_computed(driver(x, 900), model, x, 900)


def test_reset_reaches_other_threads(model):
    driver, x, go, done = Driver(**LONG), noise(), threading.Event(), threading.Event()

    def work():
        driver(x, 1000)
        done.set()
        go.wait(10)
        driver(x, 900)

    worker = threading.Thread(target=work)
    worker.start()
    done.wait(10)
    driver.runtime.reset()
    go.set()
    worker.join()
    assert driver.computed() == [True, True]


# -- invariant 7: streams, threads and models do not see each other


def alone(seed, timesteps=(1000, 900, 800, 700), **options):
    driver = Driver(**EVERY_SECOND | options)
    return [driver(noise(seed), t) for t in timesteps]


@pytest.mark.parametrize("level", LEVELS)
def test_two_calls_at_one_timestep_are_two_streams(level):
    driver = Driver(**EVERY_SECOND | {"level": level})
    both = [[driver(noise(seed), t) for seed in (0, 1)] for t in (1000, 900, 800, 700)]
    assert torch.equal(torch.stack([a for a, _ in both]), torch.stack(alone(0, level=level)))
    assert torch.equal(torch.stack([b for _, b in both]), torch.stack(alone(1, level=level)))


def test_calls_at_one_timestep_without_end_are_no_streams():
    driver = Driver(**LONG)
    for _ in range(3 * MAX_STREAMS):
        driver(noise(), 1000)
    assert max(len(t.streams) for t in driver.runtime.trajectories) == MAX_STREAMS
    assert all(driver.computed())


def test_named_streams_keep_apart_at_different_timesteps():
    driver, found = Driver(**EVERY_SECOND), {"a": [], "b": []}
    for t in (1000, 900, 800, 700):
        with stream("a"):
            found["a"].append(driver(noise(0), t))
        if t > 700:
            with stream("b"):
                found["b"].append(driver(noise(1), t - 500))
    assert torch.equal(torch.stack(found["a"]), torch.stack(alone(0)))
    assert torch.equal(torch.stack(found["b"]), torch.stack(alone(1, (500, 400, 300))))


def test_a_named_stream_that_is_left_out_at_some_steps():
    driver = Driver(**LONG)
    for t in (1000, 900, 800):
        with stream("cond"):
            driver(noise(0), t)
        if t != 900:
            with stream("uncond"):
                result = driver(noise(1), t)
    assert torch.equal(result, alone(1, (1000, 800), **LONG)[-1])


def test_names_end_with_their_block_even_after_an_error():
    def nested():
        with stream("outer"):
            with stream("inner"):
                assert _STREAM.get() == "inner"
            assert _STREAM.get() == "outer"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nested()
    assert _STREAM.get() is None


def test_two_threads_keep_apart():
    driver, barrier, found = Driver(**EVERY_SECOND), threading.Barrier(2, timeout=20), {}

    def work(seed):
        results = []
        for t in (1000, 900, 800, 700):
            barrier.wait()
            results.append(driver(noise(seed), t))
        found[seed] = results

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (0, 1):
        assert torch.equal(torch.stack(found[seed]), torch.stack(alone(seed)))


def test_two_models_keep_apart():
    models = [tiny_dit(3, seed) for seed in (0, 1)]
    compiled = [compile_eagerly(model, EVERY_SECOND) for model in models]
    expected = [sample(compile_eagerly(model, EVERY_SECOND | {"strict": True}), 4) for model in models]
    steps = []
    xs = [noise(5), noise(5)]
    with torch.no_grad():
        x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
        xs = [x, x]
        for step in range(4):
            t = torch.full((2,), 1000.0 * (1 - step / 4))
            steps.append([compiled[i](xs[i], t) for i in (0, 1)])
            xs = [xs[i] - steps[-1][i] / 4 for i in (0, 1)]
    for i in (0, 1):
        assert torch.equal(torch.stack([step[i] for step in steps]), expected[i])


# -- steering


def test_a_threshold_changes_without_compiling_again(model):
    calls = []

    def backend(gm, inputs):
        calls.append(gm)
        return eager_backend(gm, inputs, options={"cache": "tdc", "threshold": 0.0})

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(sample(compiled), sample(model), rtol=1e-5, atol=1e-6)
    qc_compiler.configure(compiled, threshold=1e9)
    assert not torch.allclose(sample(compiled), sample(model), atol=1e-4)
    qc_compiler.configure(compiled, cache="static", interval=1)
    torch.testing.assert_close(sample(compiled), sample(model), rtol=1e-5, atol=1e-6)
    assert len(calls) == 1


def test_a_whole_trajectory_with_guidance_is_one_graph(model):
    calls = []

    def backend(gm, inputs):
        calls.append(gm)
        return eager_backend(gm, inputs, options={"cache": "hlc", "level": "block", "cache_order": 2})

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for t in torch.linspace(1000, 0, 20):
            for seed in (0, 1):
                compiled(noise(seed), t.expand(2).contiguous())
    assert len(calls) == 1


def test_a_wrong_change_is_refused_and_changes_nothing():
    driver = Driver(**EVERY_SECOND)
    before = driver.runtime.options
    for changes in ({"level": "network"}, {"threshold": -1.0}, {"cache": "teacache"}):
        with pytest.raises(OptionError):
            driver.runtime.configure(**changes)
    assert driver.runtime.options is before


def test_a_graph_with_a_probe_can_leave_teacache_and_return():
    driver, x = Driver(cache="teacache", level="block", threshold=1e9), noise()
    driver.runtime.configure(cache="static", interval=100)
    driver(x, 1000)
    driver(x, 900)
    driver.runtime.configure(cache="teacache")
    driver(x, 800)
    assert driver.graph.names[0] == "probe"
    assert [row.tolist() for row in driver.decisions[1:]] == [[True, False, False, False]] * 2


def plan_for(driver, num_steps=4, **changes):
    names = driver.graph.names
    compute = np.zeros((1, num_steps, len(names)), dtype=np.bool_)
    compute[0, 0] = compute[0, 2, 1:2] = True
    weights = np.full((1, num_steps, len(names), driver.graph.interface.depth), 0.5, dtype=np.float32)
    fields = {
        "fingerprint": driver.runtime.fingerprint,
        "level": "block",
        "regions": names,
        "timesteps": tuple(1000.0 - 100 * i for i in range(num_steps)),
        "compute": compute,
        "weights": weights,
    }
    return Plan(**fields | changes)


def test_a_plan_decides_by_timestep():
    driver = Driver(**EVERY_SECOND)
    driver.runtime.configure(plan=plan_for(driver))
    for t in (1000, 900, 800, 700):
        driver(noise(), t)
    assert [row.tolist() for row in driver.decisions] == [[True] * 3, [False] * 3, [False, True, False], [False] * 3]
    assert all((row == 0.5).all() for row in driver.weights)


def test_a_step_that_the_plan_skipped_is_computed_where_no_slot_is_filled_yet():
    driver = Driver(**EVERY_SECOND)
    driver.runtime.configure(plan=plan_for(driver, compute=np.zeros((1, 4, 3), np.bool_)))
    driver(noise(), 1000)
    driver(noise(), 900)
    assert driver.computed() == [True, False]


def test_a_step_whose_weights_reach_further_back_than_the_slots_is_computed():
    driver = Driver(**EVERY_SECOND, cache_order=1)
    driver.runtime.configure(plan=plan_for(driver, compute=np.zeros((1, 4, 3), np.bool_)))
    for t in (1000, 900, 800):
        driver(noise(), t)
    assert driver.computed() == [True, True, False]


def test_plans_that_do_not_fit_are_refused():
    driver = Driver(**EVERY_SECOND)
    with pytest.raises(PlanError, match="calibrate this model"):
        driver.runtime.configure(plan=plan_for(driver, fingerprint="0" * 64))
    with pytest.raises(OptionError, match=r"needs a new torch\.compile"):
        driver.runtime.configure(plan=plan_for(driver, level="network"))
    driver.runtime.configure(plan=plan_for(driver))
    with pytest.raises(PlanError, match="none of the plan's 4 steps"):
        driver(noise(), 1234)


def test_a_wrong_plan_is_refused_when_the_model_is_compiled(model):
    driver = Driver(**EVERY_SECOND)
    compiled = compile_eagerly(model, {"plan": plan_for(driver, fingerprint="0" * 64)})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="calibrate this model"):
        sample(compiled, 1)


def test_the_number_of_steps_is_the_users_or_learned():
    assert Driver(**EVERY_SECOND, num_steps=9).runtime.num_steps() == 9
    driver = Driver(cache="hlc", level="block", threshold=1e9)
    for known in (None, 12):
        sample(driver, 12)
        assert driver.runtime.trajectories[-1].num_steps == known
        assert driver.computed()[-2:] == [True, True]


def test_slots_are_given_back_when_the_trajectory_is_over():
    driver = Driver(**EVERY_SECOND, num_steps=4)
    sample(driver, 4)
    assert driver.slots() == []


class Counted(nn.Module):
    """A model without a timestep."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_dit(2)

    def forward(self, x):
        return self.inner(x, torch.full((x.shape[0],), 500.0))


def test_without_a_timestep_steps_are_counted():
    model = Counted()
    compiled, x = compile_eagerly(model, LONG | {"num_steps": 3}), noise()
    with torch.no_grad():
        results = [compiled(x + 0.1 * step) for step in range(4)]
        expected = [model(x + 0.1 * step) for step in range(4)]
    same = [torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results, expected)]
    assert same == [True, False, False, True]


def test_without_a_timestep_or_a_number_of_steps_the_model_runs_plain():
    model, x = Counted(), noise()
    compiled = compile_eagerly(model, LONG)
    with torch.no_grad(), pytest.warns(UserWarning, match="no timestep input was found"):
        compiled(x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x + 1), model(x + 1))


# -- the noise floor


def test_a_plan_for_other_linears_needs_a_new_graph():
    driver = Driver(**EVERY_SECOND)
    with pytest.raises(OptionError, match="plan=… for linears quantized as 'w8a8' needs a new torch.compile"):
        driver.runtime.configure(plan=without_schedule(driver, quantization=quantization_for(driver, 1.0)))
    driver.runtime.options = replace(driver.runtime.options, quantize="importance")
    with pytest.raises(
        OptionError, match="'importance' needs a new torch.compile: the bits and ranges it was compiled"
    ):
        known = quantization_for(driver, 1.0, recipe="importance")
        driver.runtime.configure(plan=without_schedule(driver, quantization=known))


def quantization_for(driver, floor, num_choices=1, **changes):
    """Knows the noise of every region, higher at the lower precision."""
    fields = {
        "recipe": "w8a8",
        "sites": (),
        "bits": np.zeros(0, np.int8),
        **{name: np.zeros(0, np.float32) for name in ("ratios", "alpha", "beta")},
        "noise": np.array([[floor / 2**i] * len(driver.graph.names) for i in range(num_choices)], np.float32),
        "regions": driver.graph.names,
    }
    return Quantization(**fields | changes)


def know(driver, known):
    """Gives a driver a plan for its linears, as if its graph had been compiled with them quantized."""
    driver.runtime.options = replace(driver.runtime.options, quantize=known.recipe)
    driver.runtime.reports = [PassRun("lower-linears", Report(changed=1), 0.0)]
    driver.runtime.configure(plan=without_schedule(driver, quantization=known))


def without_schedule(driver, timesteps=(), **changes):
    """Returns a plan that leaves it to the option `cache` what is computed."""
    none = {"regions": (), "compute": np.zeros((1, len(timesteps), 0), np.bool_)}
    fields = {"timesteps": timesteps, "weights": np.zeros((1, len(timesteps), 0, 1), np.float32)}
    return plan_for(driver, **none | fields | changes)


def test_a_change_below_the_noise_floor_is_seen_as_the_floor():
    """HLC with a threshold far below the floor never skips longer than it would for a change as large as the floor."""
    plain, bounded = (Driver(cache="hlc", level="block", threshold=5.0, num_steps=50) for _ in range(2))
    know(bounded, quantization_for(bounded, 1e3))
    for t in np.linspace(1000, 500, 20):
        for driver in (plain, bounded):
            driver(noise(), t)
    steps = bounded.runtime.trajectories[-1].streams[0].steps
    changes = [step.resolve().statistics[:, Statistic.CHANGE] for step in steps if step.computed.any()]
    assert all((change == 1e3).all() for change in changes[1:])
    assert [step.num_bounded for step in steps[1:]] == [3 * step.computed.any() for step in steps[1:]]
    # τ_min of 3 in place of τ_max of 12, both at 100 steps
    assert plain.computed() == [i in (0, 1, 7, 13, 19) for i in range(20)]
    assert bounded.computed() == [i == 0 or i % 2 == 1 for i in range(20)]


def test_a_change_above_the_noise_floor_is_seen_as_it_is():
    plain, bounded = Driver(**EVERY_SECOND), Driver(**EVERY_SECOND)
    know(bounded, quantization_for(bounded, 1e-9))
    for driver in (plain, bounded):
        for t in (1000, 900, 800):
            driver(noise(), t)
    found, expected = ([s.resolve() for s in d.runtime.trajectories[-1].streams[0].steps] for d in (bounded, plain))
    assert all(np.array_equal(a.statistics, b.statistics) for a, b in zip(found, expected))
    assert sum(step.num_bounded for step in bounded.runtime.trajectories[-1].streams[0].steps) == 0


def test_a_region_that_the_plan_does_not_know_has_no_floor():
    driver = Driver(**EVERY_SECOND)
    known = quantization_for(driver, 1e3, noise=np.array([[1e3]], np.float32), regions=("blocks.1",))
    know(driver, known)
    for t in (1000, 900, 800):
        driver(noise(), t)
    last = driver.runtime.trajectories[-1].streams[0].steps[-1]
    assert (last.resolve().statistics[:, Statistic.CHANGE] == 1e3).tolist() == [False, True, False]
    assert last.num_bounded == 1


@pytest.mark.parametrize(
    ("precision", "expected"),
    [(None, [4, 4, 4]), ([0, 0, 0, 0], [4, 4, 4]), ([1, 1, 1, 1], [2, 2, 2]), ([1, 0, 1, 1], [4, 2, 4])],
)
def test_the_floor_is_that_of_the_lowest_precision_in_a_block(precision, expected):
    """Sites 0 and 1 lie in block 0, the others in block 1; block 2 has none, so it takes the lowest of all."""
    driver = Driver(**EVERY_SECOND)
    know(driver, quantization_for(driver, 4.0, 2))
    driver.graph._speaking = [0, 0, 1, 1]
    assert driver.graph._floor(None if precision is None else np.array(precision)).tolist() == expected


def test_nan_stays_nan_above_a_floor():
    floor, sums = np.full(2, 0.5, np.float32), torch.ones(2, len(Sum))
    sums[0] = float("nan")
    step = PendingStep(0, 0.0, np.ones(2, np.bool_), list(sums), None, floor)
    change = step.resolve().statistics[:, Statistic.CHANGE]
    assert np.isnan(change[0])
    assert (change[1], step.num_bounded) == (1.0, 0)


# -- what a schedule says of precision


def test_what_is_kept_is_what_the_schedule_reuses_next():
    driver = Driver(**EVERY_SECOND)
    driver.runtime.configure(plan=plan_for(driver))  # step 2 computes blocks.1 alone
    for t in (1000, 900, 800, 700):
        driver(noise(), t)
    trajectory = driver.runtime.trajectories[-1]
    kept = [
        driver.graph._kept(driver.runtime.options, Position(trajectory, False, i, 0), 1000.0 - 100 * i).tolist()
        for i in range(4)
    ]
    assert kept == [[True] * 3, [True, False, True], [True] * 3, [False] * 3]


@pytest.mark.parametrize(("cache", "expected"), [("static", True), ("off", False)])
def test_without_a_schedule_everything_may_be_kept_unless_nothing_is(cache, expected):
    driver = Driver(**EVERY_SECOND)
    driver.runtime.configure(cache=cache)
    driver(noise(), 1000)
    position = Position(driver.runtime.trajectories[-1], False, 0, 0)
    assert driver.graph._kept(driver.runtime.options, position, 1000.0).tolist() == [expected] * 3


def output_plan(driver, compute=(1, 0, 1, 0), **changes):
    return plan_for(
        driver,
        level="output",
        regions=("output",),
        compute=np.array(compute, np.bool_)[None, :, None],
        weights=np.full((1, 4, 1, 1), 1.0, np.float32),
        **changes,
    )


def test_a_schedule_of_the_output_steers_a_finer_graph():
    """As `dmpq` needs it: the statistics of blocks, and whole steps computed or not."""
    driver = Driver(**EVERY_SECOND | {"level": "output+block"})
    plan = output_plan(driver)
    driver.runtime.configure(plan=plan)
    outputs = [driver(noise(i) * 0.1 + noise(), t) for i, t in enumerate((1000, 900, 800, 700))]
    assert driver.computed() == [True, False, True, False]
    assert driver.decisions[2].shape == (4,)
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[3], outputs[2])
    position = Position(driver.runtime.trajectories[-1], False, 0, 0)
    assert driver.graph._kept(driver.runtime.options, position, 1000.0).tolist() == [True] * 4


# -- a plan that mixes streams

BOTH = noise(0), noise(1)


def mixing_plan(driver, streams=("0", "1"), compute=((1, 0, 0, 0), (1, 0, 0, 0))):
    """Its second stream adds what the first predicts now, and takes off what that had predicted."""
    across = np.zeros((2, 4, 2), np.float32)
    across[1] = 1.0, -1.0
    return plan_for(
        driver,
        level="output",
        regions=("output",),
        compute=np.array(compute, np.bool_)[..., None],
        weights=np.full((2, 4, 1, 1), 1.0, np.float32),
        streams=streams,
        across=across,
    )


def mixed(compute=((1, 1, 0, 0), (1, 0, 0, 0)), streams=("0", "1")):
    driver = Driver(**EVERY_SECOND | {"level": "output"})
    driver.runtime.configure(plan=mixing_plan(driver, streams, compute))
    return driver


def test_a_reused_stream_adds_what_the_one_before_it_predicts():
    driver = mixed()
    first = [[driver(x, t) for x in BOTH] for t in (1000, 900, 800)]
    assert driver.computed() == [True, True, True, False, False, False]
    (cond, uncond), *later = first
    for now, reused in later:
        torch.testing.assert_close(reused, uncond + (now - cond))
    assert not torch.equal(later[0][0], cond)


def test_what_a_caller_writes_into_a_prediction_changes_no_later_one():
    driver, careless = mixed(), mixed()
    for t in (1000, 900, 800):
        for x in BOTH:
            expected, found = driver(x, t), careless(x, t)
            assert torch.equal(found, expected)
            found.zero_()


def test_a_first_stream_takes_the_last_call_of_the_step_before():
    driver = mixed(compute=((1, 0, 0, 0), (1, 1, 1, 1)))
    plan = driver.runtime.options.plan
    across = np.zeros_like(plan.across)
    across[0, 1] = 0.5, 0.0
    driver.runtime.configure(plan=replace(plan, across=across))
    cond, uncond = (driver(x, 1000) for x in BOTH)
    torch.testing.assert_close(driver(BOTH[0], 900), cond + 0.5 * uncond)


def test_a_stream_is_computed_where_the_other_was_not_called_before_it():
    driver = mixed(streams=("cond", "uncond"))
    for name, t in (("cond", 1000), ("uncond", 1000), ("uncond", 900)):
        with stream(name):
            driver(noise(), t)
    assert driver.computed() == [True, True, True]


def test_named_streams_are_mixed_alike():
    expected, driver = mixed(), mixed(streams=("cond", "uncond"))
    for t in (1000, 900, 800):
        for name, x in zip(("cond", "uncond"), BOTH):
            with stream(name):
                found = driver(x, t)
            assert torch.equal(found, expected(x, t))
    assert driver.computed() == expected.computed() == [True, True, True, False, False, False]


def test_a_named_stream_alone_is_computed():
    driver = mixed(streams=("cond", "uncond"))
    with stream("uncond"):
        for t in (1000, 900):
            driver(BOTH[1], t)
    assert driver.computed() == [True, True]


# -- compensation


def corrected(level="output", compute=(1, 0, 1, 0), **options):
    """Returns a driver with a plan that corrects its output, one without, and the corrections."""
    bare = Driver(**EVERY_SECOND | {"level": level} | options)
    values = np.random.default_rng(0).uniform(0.5, 1.5, (1, 4, 8, 2)).astype(np.float32)
    plan = output_plan(bare, compute)
    bare.runtime.configure(plan=plan)
    return Driver(plan=replace(plan, compensation=values)), bare, torch.from_numpy(values)[0]


def test_computed_and_reused_steps_are_corrected_each_with_its_own():
    driver, bare, values = corrected()
    for i, t in enumerate((1000, 900, 800, 700)):
        x = noise() + 0.1 * noise(i)
        expected = compensate(bare(x, t), values[i])
        torch.testing.assert_close(driver(x, t), expected, rtol=1e-5, atol=1e-6)
    assert driver.computed() == bare.computed() == [True, False, True, False]


def test_what_is_reused_is_not_corrected_twice():
    driver, bare, _ = corrected(compute=(1, 0, 0, 0))
    for t in (1000, 900, 800):
        driver(noise(), t)
        bare(noise(), t)
    assert all(torch.equal(a, b) for a, b in zip(driver.slots(), bare.slots(), strict=True))


def test_a_stream_that_the_plan_does_not_know_takes_the_first_ones_correction():
    driver, bare, values = corrected()
    for x in (noise(0), noise(1)):
        torch.testing.assert_close(driver(x, 1000), compensate(bare(x, 1000), values[0]), rtol=1e-5, atol=1e-6)


def test_without_a_compensation_in_the_plan_the_graph_returns_what_the_model_said():
    driver, bare, _ = corrected()
    driver.runtime.configure(plan=replace(driver.runtime.options.plan, compensation=None))
    for t in (1000, 900):
        assert torch.equal(driver(noise(), t), bare(noise(), t))


def test_a_graph_without_correction_refuses_a_plan_that_corrects():
    """It would correct the steps that it reuses and not those that it computes."""
    driver, bare, _ = corrected()
    with pytest.raises(OptionError, match=r"needs a new torch\.compile"):
        bare.runtime.configure(plan=driver.runtime.options.plan)


def test_where_the_graph_could_not_be_corrected_reused_steps_are_not_either():
    """An output without channels: `CompensateOutput` skips it."""
    driver, *_ = corrected()
    driver(noise(), 1000)
    position = Position(driver.runtime.trajectories[-1], False, 1, 0)
    assert driver.graph._compensation(position, 900.0) is not None
    driver.graph.interface.num_channels = None
    assert driver.graph._compensation(position, 900.0) is None


def test_a_pilot_sees_what_the_model_said_and_its_result_is_returned():
    class OneMore(Pilot):
        def observe(self, graph, position, timestep, inputs, results):
            self.seen = results[0].clone()
            return (results[0] + 1,)

    driver, bare, _ = corrected()
    driver.runtime.pilot = OneMore()
    result, expected = driver(noise(), 1000), bare(noise(), 1000)
    assert torch.equal(driver.runtime.pilot.seen, expected)
    assert torch.equal(result, expected + 1)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_in_mid_step_leaves_a_corrected_trajectory_as_it_was(failing, monkeypatch):
    undisturbed, driver = corrected()[0], corrected()[0]
    for i, t in enumerate((1000, 900, 800, 700)):
        expected = undisturbed(noise(), t)
        if i == failing:
            before = driver.slots()
            num_steps = [len(s.steps) for t in driver.runtime.trajectories for s in t.streams]
            with monkeypatch.context() as patch:
                patch.setattr("qc_compiler.runtime.compensate", fails)
                if i != 1:
                    patch.setattr(driver.graph, "compiled", fails)
                with pytest.raises(torch.OutOfMemoryError):
                    driver(noise(), t)
            assert [id(a) for a in driver.slots()] == [id(b) for b in before]
            assert [len(s.steps) for t in driver.runtime.trajectories for s in t.streams] == num_steps
        assert torch.equal(driver(noise(), t), expected)


def fails(*_):
    raise torch.OutOfMemoryError("out of memory")


# -- extrapolation


def test_the_order_falls_back_while_the_history_is_short():
    driver = Driver(**EVERY_SECOND | {"cache_order": 2, "interval": 1})
    for t in (1000, 900):
        driver(noise(), t)
    driver.runtime.configure(interval=100)
    driver(noise(), 850)
    assert driver.weights[-1].tolist() == [[1.5, -0.5, 0.0]] * 3
    assert driver.computed() == [True, True, False]
    driver = Driver(**LONG, cache_order=2)
    for t in (1000, 900):
        driver(noise(), t)
    assert driver.weights[-1].tolist() == [[1.0, 0.0, 0.0]] * 3
    driver = Driver(**EVERY_SECOND | {"cache_order": 2, "interval": 1})
    for t in (1000, 900, 800):
        driver(noise(), t)
    driver.runtime.configure(interval=100)
    driver(noise(), 700)
    assert driver.weights[-1].tolist() == [[3.0, -3.0, 1.0]] * 3


def test_reuse_repeats_what_the_graph_returned_to_the_last_bit():
    """At the level of the output a reused step of order 0 is the step before."""
    driver = Driver(**LONG | {"level": "output"})
    first = driver(noise(), 1000)
    assert torch.equal(driver(noise(), 900), first)


@pytest.mark.parametrize("level", LEVELS)
def test_what_the_user_does_to_a_result_does_not_reach_the_slots(level):
    spoiled, left_alone = Driver(**LONG | {"level": level}), Driver(**LONG | {"level": level})
    for t in (1000, 900, 800):
        result = spoiled(noise(), t)
        expected = left_alone(noise(), t)
        assert torch.equal(result, expected)
        result.fill_(float("nan"))


@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_compressed_slots_are_within_the_documented_bound(cache_dtype):
    narrow, wide = Driver(**LONG, cache_dtype=cache_dtype), Driver(**LONG)
    for driver in (narrow, wide):
        driver(noise(), 1000)
    assert narrow.slots()[0].element_size() == 1
    pairs = zip(narrow.slots()[::2], narrow.slots()[1::2], wide.slots())
    for codes, scale, delta in pairs:
        form = parse_format(cache_dtype)
        error, bound = (form.dequantize(codes, scale) - delta).abs(), form.bound(delta, codes, scale)
        # the residual itself differs by what another order of the float32 sums makes of it
        assert (error <= bound * (1 + 1e-5) + 1e-6).all()
    result, expected = narrow(noise(), 900), wide(noise(), 900)
    assert 0 < (result - expected).abs().mean() / expected.abs().mean() < 0.05


# -- faults


@pytest.mark.parametrize("level", LEVELS)
def test_a_failure_in_mid_step_leaves_the_slots_of_the_step_before(level):
    options = EVERY_SECOND | {"level": level, "cache_order": 1}
    driver, expected = Driver(**options), []
    undisturbed = Driver(**options)
    for number, t in enumerate((1000, 900, 800, 700, 600)):
        expected.append(undisturbed(noise(), t))
        compiled = driver.graph.compiled

        def fails(*args, compiled=compiled):
            compiled(*args)
            raise torch.OutOfMemoryError("out of memory")

        if number in (0, 2, 4):
            driver.graph.compiled = fails
            before = driver.slots()
            with pytest.raises(torch.OutOfMemoryError):
                driver(noise(), t)
            assert [id(a) for a in driver.slots()] == [id(b) for b in before]
            driver.graph.compiled = compiled
        assert torch.equal(driver(noise(), t), expected[-1])


def test_nan_in_a_parameter_for_one_step(model):
    driver, x = Driver(**EVERY_SECOND), noise()
    weight = driver.parameters[-3]
    for t in (1000, 900):
        driver(x, t)
    whole = weight.data
    weight.data = torch.full_like(whole, float("nan"))
    assert driver(x, 800).isnan().any()  # computed, since the weights changed
    # The weights come back unnoticed: what notices is that the statistics hold NaN.
    version = driver.graph._parameters_version(driver.inputs)
    driver.graph._parameters_version = lambda inputs: version
    weight.data = whole
    with pytest.warns(UserWarning, match=r"NaN or Inf in the statistics of blocks\.\d.*computed in full") as caught:
        result = driver(x, 700)
    assert len(caught) == 1
    assert_computed(result, model, x, 700)
    assert driver.computed()[-1]
    assert all(slot.isfinite().all() for slot in driver.slots())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        driver(x, 600)


def test_a_poisoned_slot_is_refilled(model):
    driver, x = Driver(**EVERY_SECOND), noise()
    driver(x, 1000)
    driver.slots()[0][0, 0, 0] = float("nan")
    driver(x, 900)
    driver(x, 800)  # computed; compared with the poisoned slot
    with pytest.warns(UserWarning, match="NaN or Inf"):
        assert_computed(driver(x, 700), model, x, 700)
    assert all(slot.isfinite().all() for slot in driver.slots())


def test_nan_warns_once_a_place():
    driver, x = Driver(**EVERY_SECOND), noise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(1200, 0, -100):
            driver(x, t)
            for slot in driver.slots():
                slot.fill_(float("inf"))
    assert len(caught) == 1


def spoil_data(weight):
    weight.data = weight.data + 1


def spoil_in_place(weight):
    with torch.no_grad():
        weight.add_(1)


def spoil_by_copy(weight):
    with torch.no_grad():
        weight.copy_(weight + 1)  # what load_state_dict does


@pytest.mark.parametrize("spoil", [spoil_data, spoil_in_place, spoil_by_copy])
@pytest.mark.parametrize("level", LEVELS)
def test_changed_weights_drop_the_slots(spoil, level):
    driver = Driver(**LONG | {"level": level})
    for t in (1000, 900):
        driver(noise(), t)
    spoil(driver.parameters[4])
    fresh = Driver(**LONG | {"level": level})
    fresh.inputs = driver.inputs
    assert torch.equal(driver(noise(), 800), fresh(noise(), 800))
    assert driver.computed() == [True, False, True]


def test_load_state_dict_drops_the_slots():
    model, other, x = tiny_dit(2, seed=0), tiny_dit(2, seed=1), noise()
    compiled = compile_eagerly(model, LONG)
    with torch.no_grad():
        compiled(x, torch.full((2,), 1000.0))
        model.load_state_dict(other.state_dict())
        assert_computed(compiled(x, torch.full((2,), 900.0)), other, x, 900)


def test_a_model_that_moves_to_another_dtype_drops_its_slots():
    model, x = tiny_dit(2), noise()
    compiled = compile_eagerly(model, LONG)
    with torch.no_grad():
        compiled(x, torch.full((2,), 1000.0))
        model.double()
        result = compiled(x.double(), torch.full((2,), 900.0))
        torch.testing.assert_close(result, model(x.double(), torch.full((2,), 900.0)))


def test_a_change_of_precision_in_mid_trajectory_drops_the_slots(model):
    """Under autocast the residual stream has another dtype, which no slot of the step before has."""
    compiled, x = compile_eagerly(model, LONG), noise()
    with torch.no_grad():
        compiled(x, torch.full((2,), 1000.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result, expected = compiled(x, torch.full((2,), 900.0)), model(x, torch.full((2,), 900.0))
    torch.testing.assert_close(result, expected, rtol=5e-2, atol=5e-2)
    assert torch.allclose(result.float(), expected.float(), atol=5e-2)
    (trajectory,) = runtime_of(compiled).trajectories
    assert {slot.dtype for history in trajectory.streams[0].history for _, (slot,) in history} == {torch.bfloat16}


class Prompted(nn.Module):
    """Two streams: the sample and a prompt, whose length may change from call to call."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(2))

    def forward(self, x, prompt, timestep):
        prompt = prompt + timestep.sin()[:, None, None]
        for block in self.blocks:
            x, prompt = block(x, prompt)
        return x + prompt.mean(dim=1, keepdim=True)


class Joint(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, prompt):
        both = torch.cat([x, prompt], dim=1)
        q, k, v = self.qkv(both)[:, None].chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + mixed[:, : x.shape[1]], prompt + mixed[:, x.shape[1] :]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_prompt_of_another_length_does_not_meet_the_slots_of_the_last(dynamic):
    """The sample keeps its shape, so only the slots themselves tell."""
    torch.manual_seed(0)
    model = Prompted().eval().requires_grad_(False)
    compiled = compile_eagerly(model, LONG, dynamic=dynamic)
    with torch.no_grad():
        for t, length in ((1000.0, 5), (900.0, 5), (800.0, 7), (700.0, 4), (600.0, 4)):
            args = noise(0), noise(1, 2, length, 8), torch.full((2,), t)
            same = torch.allclose(compiled(*args), model(*args), rtol=1e-5, atol=1e-5)
            assert same == (t in (1000.0, 800.0, 700.0)), t


def test_gradients_run_plain_with_one_warning(model):
    trainable = tiny_dit(2).requires_grad_(True)
    compiled, x = compile_eagerly(trainable, LONG), noise()
    with pytest.warns(UserWarning, match=r"plain Inductor: gradients are enabled.*torch\.no_grad\(\)") as caught:
        compiled(x, torch.full((2,), 1000.0))
    assert len(caught) == 1
    for t in (900.0, 800.0):
        result = compiled(x, torch.full((2,), t))
        torch.testing.assert_close(result, trainable(x, torch.full((2,), t)))
        result.sum().backward()
    assert all(p.grad is not None for p in trainable.blocks.parameters())
    with torch.no_grad():
        compiled(x, torch.full((2,), 1000.0))
        assert_reused(compiled(x, torch.full((2,), 900.0)), trainable, x, 900)


def test_gradients_are_an_error_if_strict():
    compiled = compile_eagerly(tiny_dit(1).requires_grad_(True), LONG | {"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="gradients are enabled") as caught:
        compiled(noise(), torch.full((2,), 1000.0))
    assert isinstance(caught.value.inner_exception, UnsupportedModelError)


# -- memory


@pytest.mark.parametrize("num_steps", [None, 3])
def test_memory_is_flat_over_many_trajectories(num_steps):
    driver = Driver(**EVERY_SECOND | {"cache_order": 1}, num_steps=num_steps)
    seen, counts = weakref.WeakSet(), []
    gc.collect()
    for seed in range(200):
        sample(driver, 3, seed=seed)
        seen.update(driver.slots())
        if seed % 50 == 49:
            gc.collect()
            counts.append((len(seen), sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())))
    assert counts[-1][0] <= counts[0][0]
    assert counts[-1][1] <= counts[0][1]
    depth, regions = driver.graph.interface.depth, len(driver.graph.names)
    assert counts[0][0] <= (0 if num_steps else depth * regions)


def test_a_superseded_trajectory_keeps_no_slots():
    driver = Driver(**LONG)
    for seed in range(5):  # each with timesteps of its own, so that no length can be learned
        driver(noise(seed), 1000)
        driver(noise(seed), 900 - seed)
    assert len(driver.slots()) == len(driver.graph.names)
    assert len(driver.runtime.last_trajectories()) == 1


def test_requests_that_are_given_up_do_not_pile_up():
    """Each has a name of its own, and none is ever finished."""
    driver, references = Driver(**LONG), []
    for number in range(MAX_TRAJECTORIES + 50):
        with stream(f"request {number}"):
            driver(noise(), 1000)
        references += [weakref.ref(slot) for slot in driver.slots()[-len(driver.graph.names) :]]
    gc.collect()
    assert sum(reference() is not None for reference in references) == MAX_TRAJECTORIES * len(driver.graph.names)
    with stream(f"request {number}"):
        driver(noise(), 900)
    assert driver.computed()[-2:] == [True, False]


# -- invariant 9: ranks decide alike


def test_ranks_of_a_process_group_decide_alike(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(decide_as_rank, (str(tmp_path / "store"), results), nprocs=2)
        results = dict(results)
    assert results[0] == {False: [True] * 3, True: [True] * 3}
    assert results[1] == {False: [True, False, False], True: [True] * 3}


# -- pruning: what is not computed and has no weight

THREE = ("blocks.0", "blocks.1", "blocks.2")


def pruning_plan(compute, level="block", regions=THREE, weights=1.0, **known):
    """A plan for the steps at 1000, 900, …; a None in `compute` prunes, a False reuses."""
    rows = np.array([[bool(entry) for entry in row] for row in compute])
    factors = np.array([[[0.0 if entry is None else weights] for entry in row] for row in compute], np.float32)
    return Plan(
        "", level, regions, tuple(1000.0 - 100 * i for i in range(len(rows))), rows[None], factors[None], **known
    )


class Bypassed(nn.Module):
    """The model without some of its blocks, and with residuals as they were."""

    def __init__(self, model):
        super().__init__()
        self.model, self.residuals = model, {}

    def forward(self, x, timestep, row):
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(8))
        temb = self.model.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.model.embed(x)
        for i, (block, entry) in enumerate(zip(self.model.blocks, row)):
            if entry:
                self.residuals[i] = block(x, temb) - x
            x = x if entry is None else x + self.residuals[i]
        return self.model.head(x)


def check_steps(driver, model, compute):
    reference = Bypassed(model)
    for i, row in enumerate(compute):
        x, t = noise(), 1000 - 100 * i
        with torch.no_grad():
            expected = reference(x, torch.full((2,), float(t)), row)
        torch.testing.assert_close(driver(x, t), expected, rtol=1e-5, atol=1e-5)


def test_a_region_without_weight_is_pruned_at_that_step_even_if_it_has_no_slot(model):
    compute = [(None, True, True), (True, None, False), (False, True, None), (None, False, False)]
    driver = Driver(plan=pruning_plan(compute))
    check_steps(driver, model, compute)
    assert [row.tolist() for row in driver.decisions] == [[bool(entry) for entry in row] for row in compute]
    assert driver.runtime.peak_slot_bytes == 3 * 2 * 16 * 32 * 4


def test_columns_are_found_by_name_where_a_region_has_left(model):
    compute = [(True, None, True), (False, None, True), (True, None, False)]
    driver = Driver(plan=pruning_plan(compute))
    assert driver.graph.names == ("blocks.0", "blocks.2")
    check_steps(driver, model, compute)
    shuffled = pruning_plan([(row[2], row[1], row[0]) for row in compute], regions=THREE[::-1])
    check_steps(Driver(plan=shuffled), model, compute)


def test_a_sublayer_that_is_pruned_adds_nothing(model):
    names = [f"blocks.{i}/{kind}" for i in range(3) for kind in ("attention", "mlp")]
    plan = pruning_plan([(True, None, True, True, True, True), (True,) * 6], "sublayer", tuple(names))
    driver = Driver(plan=plan)
    model.blocks[0].mlp.forward = torch.zeros_like
    assert_computed(driver(noise(), 1000), model, noise(), 1000)


def test_where_a_plan_skips_the_output_nothing_is_pruned(model):
    """Blocks have no weights at steps that are skipped as a whole; if such a step must be computed, it is in full."""
    regions = ("output", *THREE)
    plan = pruning_plan([(True,) * 4, (False, None, None, None), (True, None, True, True)], "output+block", regions)
    assert plan.removed == ()
    driver, x = Driver(plan=plan), noise()
    driver(x, 1000)
    driver.runtime.trajectories[-1].streams[0].clear_slots()
    assert_computed(driver(x, 900), model, x, 900)
    driver(x, 800)
    assert [row.tolist() for row in driver.decisions] == [[True] * 4, [True] * 4, [True, False, True, True]]


@pytest.mark.parametrize("level", ["output", "output+block"])
def test_an_output_cannot_be_pruned(level):
    regions = ("output", *THREE)[: 1 if level == "output" else 4]
    compute = [(True,) * len(regions), (None,) * len(regions)]
    with pytest.raises(PlanError, match="prunes 'output' at step 1, but a result of it is no residual"):
        Driver(plan=pruning_plan(compute, level, regions))


def test_a_plan_that_removes_something_else_needs_a_new_graph():
    driver = Driver(plan=pruning_plan([(True, None, True)] * 2))
    driver.runtime.configure(plan=pruning_plan([(True, None, True), (False, None, True)]))
    for compute in ([(True, None, None)] * 2, [(True, True, True)] * 2):
        with pytest.raises(OptionError, match=r"needs a new torch\.compile: this model was compiled without blocks\.1"):
            driver.runtime.configure(plan=pruning_plan(compute))


def test_a_rule_computes_what_has_no_slot(model):
    """Weights of zero prune only where they were meant."""
    driver, x = Driver(**LONG), noise()
    driver(x, 1000)
    driver.runtime.trajectories[-1].streams[0].history[1].clear()
    driver(x, 900)
    assert driver.decisions[-1].tolist() == [False, True, False]


# -- SRAP

SRAP = {"cache": "off", "prune": "srap", "prune_threshold": 0.1, "level": "block"}


def force(driver, cosine):
    """Makes the blocks' cosines what `cosine` says."""

    def observed(*args):
        produced = list(run(*args))
        for r, value in enumerate(cosine):
            sums = produced[1 + r].clone()
            sums[[Sum.DOT, Sum.BEFORE_SQUARED, Sum.AFTER_SQUARED]] = torch.tensor([value, 1.0, 1.0])
            produced[1 + r] = sums
        return produced

    run = driver.graph.compiled
    driver.graph.compiled = observed


def srap_driver(cosine, **options):
    driver = Driver(cache="static", level="block")
    driver.runtime.options = replace(driver.runtime.options, **SRAP | options)
    force(driver, cosine)
    return driver


def test_srap_prunes_redundant_blocks_at_computed_steps(model):
    driver, x = srap_driver((0.999, 0.0, 0.999), prune_threshold=0.995), noise()
    for i in range(7):
        found = driver(x, 1000 - 100 * i)
        with torch.no_grad():
            row = [True if entry else None for entry in driver.decisions[-1]]
            expected = Bypassed(model)(x, torch.full((2,), 1000.0 - 100 * i), row)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [row.tolist() for row in driver.decisions] == [
        [True] * 3,
        *[[False, True, False]] * 4,
        [True] * 3,
        [False, True, False],
    ]


def test_srap_leaves_the_rule_its_rhythm(model):
    """A block that is pruned where the others are computed is reused where they are."""
    driver = srap_driver((0.999, 0.0, 0.0), prune_threshold=0.995, cache="static", interval=2)
    for i in range(6):
        driver(noise(), 1000 - 100 * i)
    assert [row.tolist() for row in driver.decisions] == [
        [True] * 3,
        [False] * 3,
        [False, True, True],
        [False] * 3,
        [False, True, True],
        [False] * 3,
    ]
    assert [row[0].item() for row in driver.weights[1:]] == [1, 0, 1, 0, 1]
    steps = driver.runtime.trajectories[-1].streams[0].steps
    first = [True, False, False]
    assert [None if step.pruned is None else step.pruned.tolist() for step in steps] == [
        None,
        None,
        first,
        None,
        first,
        None,
    ]


def test_srap_does_not_prune_what_must_be_refilled(model):
    driver, x = srap_driver((0.999,) * 3, prune_threshold=0.995), noise()
    driver(x, 1000)
    driver.runtime.trajectories[-1].streams[0].clear_slots()
    assert_computed(driver(x, 900), model, x, 900)


def test_srap_does_not_prune_what_has_no_base():
    driver = srap_driver((0.999,) * 3, prune_threshold=0.995)
    driver.graph._prunable = np.array([False, True, True])
    driver(noise(), 1000)
    driver(noise(), 900)
    assert driver.decisions[-1].tolist() == [True, False, False]


def test_the_threshold_of_srap_moves_without_compiling(model):
    driver, x = srap_driver((0.9,) * 3, prune_threshold=0.995), noise()
    driver(x, 1000)
    driver(x, 900)
    driver.runtime.configure(prune_threshold=0.85)
    driver(x, 800)
    assert driver.computed() == [True, True, False]
    with pytest.raises(OptionError, match="option 'prune' cannot change"):
        driver.runtime.configure(prune=None)


def test_two_streams_of_srap_draw_alike():
    driver = srap_driver((0.99,) * 3, prune_threshold=0.995)
    for i in range(6):
        for seed in range(2):
            driver(noise(seed), 1000 - 100 * i)
    rows = [row.tolist() for row in driver.decisions]
    assert rows[::2] == rows[1::2]
    assert any(not all(row) for row in rows)


def test_a_rank_that_keeps_a_block_keeps_it_on_all(monkeypatch):
    """Invariant 9: the second vote of a step is about pruning."""
    driver, votes = srap_driver((0.999,) * 3, prune_threshold=0.995), []

    def agree(wanted, group):
        votes.append(wanted.tolist())
        return wanted if len(votes) != 4 else wanted | np.array([False, True, False])

    monkeypatch.setattr("qc_compiler.runtime._agree", agree)
    driver(noise(), 1000)
    driver(noise(), 900)
    assert votes == [[True] * 3] * 3 + [[False] * 3]
    assert driver.decisions[-1].tolist() == [False, True, False]
