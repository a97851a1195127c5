"""Attention heads that are kept from step to step: the runtime's invariants, for them."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qc_compiler
from driver import Driver, noise
from head_plans import DenseHeads, attentions, head_plan, plan_for, run_steps
from qc_compiler import OptionError, Plan, PlanError, stream
from qc_compiler.attention import CACHED, FULL, ROW, WINDOW
from tiny_models import Attention, compile_eagerly, eager_backend, tiny_dit

STEPS = 5
ALWAYS = {"cache": "static", "interval": 1, "level": "block"}
LEVELS = ["output", "network", "block", "sublayer", "output+block"]


def caching(*heads, first=1, streams=1, order="raster", depth=1, code=CACHED):
    """Returns a plan that from step `first` on takes these heads of every layer from the cache."""
    windows = np.full((streams, STEPS, depth, 4), FULL, dtype=np.float32)
    windows[:, first:, :, list(heads)] = code
    return plan_for(head_plan(windows, order=order))


def heads_of(driver, step):
    """Returns what layer 0 did at a step."""
    return driver.modes[step][0, WINDOW].tolist()


def seen_by(driver):
    """Makes a driver keep what every attention returned."""
    seen, attend = [], qc_compiler.ops.attend

    def observe(*operands):
        seen.append(attend(*operands).clone())
        return seen[-1]

    return seen, qc_compiler.ops.observed(observe)


# -- what is kept


@pytest.mark.parametrize("level", ["output", "block"])
def test_a_cached_head_is_the_last_computed_one_to_the_bit(level):
    driver = Driver(1, **ALWAYS | {"level": level}, plan=caching(1, 3))
    seen, watching = seen_by(driver)
    with watching:
        run_steps(driver, 3)
    first, second, third = seen
    for later in (second, third):
        assert torch.equal(later[:, [1, 3]], first[:, [1, 3]])
        assert not torch.equal(later[:, [0, 2]], first[:, [0, 2]])
    (kept,) = driver.kept()
    assert torch.equal(kept, first[:, [1, 3]])


def test_a_head_that_is_computed_again_is_kept_anew():
    windows = np.full((STEPS, 1, 4), FULL)
    windows[1, 0, 2] = windows[3, 0, 2] = CACHED
    driver = Driver(1, **ALWAYS, plan=plan_for(head_plan(windows)))
    seen, watching = seen_by(driver)
    with watching:
        run_steps(driver, 4)
    assert torch.equal(seen[1][:, 2], seen[0][:, 2])
    assert torch.equal(seen[3][:, 2], seen[2][:, 2])
    assert not torch.equal(seen[2][:, 2], seen[0][:, 2])


def test_slots_hold_only_heads_that_some_step_caches(monkeypatch):
    windows = np.full((STEPS, 3, 4), FULL)
    windows[1, 0, 0] = windows[2, 0, 3] = windows[4, 2, 1] = CACHED
    driver = Driver(3, **ALWAYS, plan=plan_for(head_plan(windows)))
    run_steps(driver, 2)
    assert [layer.num_kept for layer in driver.graph.interface.layers] == [2, 0, 1]
    assert [tuple(kept.shape) for kept in driver.kept()] == [(2, 2, 16, 8), (2, 1, 16, 8)]
    monkeypatch.setattr("qc_compiler.trajectory_summary.runtime_of", lambda _: driver.runtime)
    summary = qc_compiler.summary(SimpleNamespace())
    residuals, kept = 3 * 2 * 16 * 32 * 4, 3 * 2 * 16 * 8 * 4
    assert summary.peak_slot_bytes == summary.streams[0].slot_bytes == residuals + kept


def test_slots_are_given_back_when_the_trajectory_is_over():
    driver = Driver(1, **ALWAYS, plan=caching(0))
    run_steps(driver, STEPS - 1)
    assert driver.kept()[0] is not None
    run_steps(driver, STEPS)
    assert driver.kept() == [None]


# -- streams, threads, trajectories


def alone(seed, plan, num_steps=3):
    return run_steps(Driver(1, **ALWAYS, plan=plan), num_steps, seed)


def test_two_streams_keep_heads_of_their_own():
    windows = np.full((2, STEPS, 1, 4), FULL)
    windows[0, 1:, :, :2] = windows[1, 1:, :, 2:] = CACHED
    driver, expected = Driver(1, **ALWAYS, plan=plan_for(head_plan(windows))), []
    for turn, own in enumerate((windows[:1], windows[1:])):
        both = own.copy()
        both[0, -1] = CACHED  # keeps all heads, as the plan of two streams does
        expected.append(alone(turn, plan_for(head_plan(both))))
    found = [[], []]
    xs = [torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for i in range(3):
        for turn, x in enumerate(xs):
            found[turn].append(driver(x * (1 - 0.1 * i), 1000 - 100 * i))
    for ours, theirs in zip(found, expected):
        assert all(map(torch.equal, ours, theirs))
    assert [modes[0, WINDOW].tolist() for modes in driver.modes[2:4]] == [[0, 0, -1, -1], [-1, -1, 0, 0]]


def test_a_stream_that_the_plan_does_not_know_does_what_the_first_does():
    driver = Driver(1, **ALWAYS, plan=caching(0))
    for t in (1000, 900):
        with stream("unknown"):
            driver(noise(), t)
    assert heads_of(driver, 1) == [CACHED, FULL, FULL, FULL]


def test_two_threads_keep_heads_of_their_own():
    driver, barrier, found = Driver(1, **ALWAYS, plan=caching(0, 1, 2, 3)), threading.Barrier(2, timeout=20), {}

    def work(seed):
        def in_turn(x, timestep):
            barrier.wait()
            return driver(x, timestep)

        found[seed] = run_steps(in_turn, 3, seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (0, 1):
        assert all(map(torch.equal, found[seed], alone(seed, caching(0, 1, 2, 3))))


@pytest.mark.parametrize("heads", [(1,), (0, 1, 2, 3)])
def test_a_new_trajectory_starts_empty(heads):
    """Its cached heads are full until there is something to take."""
    driver = Driver(1, **ALWAYS, plan=caching(*heads, first=0))
    run_steps(driver, 2)
    again = run_steps(driver, 2, seed=1)
    cached = [CACHED if h in heads else FULL for h in range(4)]
    assert [heads_of(driver, i) for i in range(4)] == [[FULL] * 4, cached] * 2
    assert all(map(torch.equal, again, alone(1, caching(*heads, first=0), 2)))


# -- steps in which a layer is not computed


@pytest.mark.parametrize("level", LEVELS)
def test_a_layer_that_a_guard_skips_keeps_the_heads_it_has(level):
    driver = Driver(1, **ALWAYS | {"level": level, "interval": 2}, plan=caching(0, 1, 2, 3, first=2))
    x = noise()
    driver(x, 1000)
    (before,) = driver.kept()
    copy = before.clone()
    driver(0.9 * x, 900)
    assert driver.computed() == [True, False]
    (after,) = driver.kept()
    assert after is before
    driver(0.8 * x, 800)
    assert heads_of(driver, -1) == [CACHED] * 4
    assert torch.equal(driver.kept()[0], copy)


def test_a_reused_block_leaves_the_heads_of_its_neighbours_alone():
    windows = np.full((STEPS, 2, 4), FULL)
    windows[2] = CACHED
    schedule = np.ones((STEPS, 2), dtype=np.bool_)
    schedule[1] = False, True
    driver = Driver(2, level="block", plan=plan_for(head_plan(windows), schedule))
    driver(noise(), 1000)
    first = list(driver.kept())
    driver(0.9 * noise(), 900)
    second = driver.kept()
    assert second[0] is first[0]
    assert not torch.equal(second[1], first[1])


# -- faults


def test_a_failure_in_mid_step_leaves_the_heads_of_the_step_before():
    driver, undisturbed = Driver(1, **ALWAYS, plan=caching(0, 2, first=2)), alone(0, caching(0, 2, first=2), 3)
    compiled, x = driver.graph.compiled, noise(0, 2, 16, 8)

    def fails(*args):
        compiled(*args)
        raise torch.OutOfMemoryError("out of memory")

    assert torch.equal(driver(x, 1000), undisturbed[0])
    for i in (1, 2):
        before = list(driver.kept())
        driver.graph.compiled = fails
        with pytest.raises(torch.OutOfMemoryError):
            driver(x * (1 - 0.1 * i), 1000 - 100 * i)
        assert driver.kept()[0] is before[0]
        driver.graph.compiled = compiled
        assert torch.equal(driver(x * (1 - 0.1 * i), 1000 - 100 * i), undisturbed[i])


def test_a_failure_at_the_first_step_leaves_nothing():
    driver = Driver(1, **ALWAYS, plan=caching(0, first=0))
    compiled = driver.graph.compiled

    def fails(*args):
        raise torch.OutOfMemoryError("out of memory")

    driver.graph.compiled = fails
    with pytest.raises(torch.OutOfMemoryError):
        driver(noise(), 1000)
    driver.graph.compiled = compiled
    driver(noise(), 900)
    assert heads_of(driver, 0) == [FULL] * 4


def test_changed_weights_drop_the_heads():
    driver = Driver(1, **ALWAYS, plan=caching(0, 1))
    driver(noise(), 1000)
    with torch.no_grad():
        driver.parameters[-1].add_(1)
    driver(noise(), 900)
    driver(noise(), 800)
    assert [heads_of(driver, i) for i in (1, 2)] == [[FULL] * 4, [CACHED, CACHED, FULL, FULL]]


def test_nan_drops_the_heads():
    driver, x = Driver(1, **ALWAYS, plan=caching(0, 1, 2, 3)), noise()
    version, weight = driver.graph._parameters_version(driver.inputs), driver.parameters[-3]
    driver.graph._parameters_version = lambda _: version  # what notices is that the statistics hold NaN
    whole, weight.data = weight.data, torch.full_like(weight, torch.nan)
    driver(x, 1000)
    weight.data = whole
    with pytest.warns(UserWarning, match="NaN or Inf"):
        driver(0.9 * x, 900)
    driver(0.8 * x, 800)
    assert [heads_of(driver, i) for i in (1, 2)] == [[FULL] * 4, [CACHED] * 4]


class Masked(nn.Module):
    """Some calls have a mask, and their attention no heads: a graph of its own."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_dit(1)

    def forward(self, x, timestep, mask=None):
        for block in self.inner.blocks:
            block.attn.mask = mask
        return self.inner(x, timestep)


class MaskedAttention(Attention):
    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("masked", [(True, False, False), (False, True, False)])
def test_a_graph_without_heads_and_one_with_them_share_a_trajectory(masked):
    """What one of them did not keep the other does not take."""
    torch.manual_seed(0)
    model = Masked().eval().requires_grad_(False)
    for block in model.inner.blocks:
        block.attn.__class__, block.attn.mask = MaskedAttention, None
    plan = caching(*range(4))
    plan = plan_for(head_plan(plan.attention.windows, ["inner.blocks.0.attn"]))
    compiled, x = compile_eagerly(model, ALWAYS | {"plan": plan}), noise()
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    with torch.no_grad():
        for i, has_mask in enumerate(masked):
            args = x, torch.full((2,), 1000.0 - 100 * i), mask if has_mask else None
            found, expected = compiled(*args), model(*args)
            if i == 0 or has_mask or masked[i - 1]:
                torch.testing.assert_close(found, expected)
            else:
                assert not torch.allclose(found, expected, atol=1e-4)


# -- other plans for the same graph


def test_other_windows_need_no_new_graph():
    calls, model = [], tiny_dit(1)

    def backend(gm, inputs):
        calls.append(gm)
        return eager_backend(gm, inputs, options=ALWAYS | {"plan": caching(0, 1)})

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = [run_steps(compiled, 3)]
    for plan in (caching(0, 1, first=2), caching(1), caching(2), caching(2, 3, code=0.25), caching()):
        qc_compiler.configure(compiled, plan=plan)
        qc_compiler.reset(compiled)
        results.append(run_steps(compiled, 3))
        expected = run_steps(DenseHeads(model, plan.attention.windows[0]), 3)
        torch.testing.assert_close([result.double() for result in results[-1]], expected, rtol=1e-5, atol=2e-6)
    assert len(calls) == 1
    assert (
        len({tuple(result[1].flatten().tolist()) for result in results}) == 5
    )  # the second and the last are full there


def test_a_plan_that_comes_in_mid_trajectory_does_not_take_other_heads_for_its_own():
    driver = Driver(1, **ALWAYS, plan=caching(0, 1))
    seen, watching = seen_by(driver)
    with watching:
        driver(noise(), 1000)
        driver.runtime.configure(plan=caching(2, 3))
        driver(0.9 * noise(), 900)
        driver(0.8 * noise(), 800)
    assert [heads_of(driver, i) for i in (1, 2)] == [[FULL] * 4, [FULL, FULL, CACHED, CACHED]]
    assert torch.equal(seen[2][:, 2:], seen[1][:, 2:])


def test_a_plan_that_caches_the_same_heads_takes_those_that_are_there():
    driver = Driver(1, **ALWAYS, plan=caching(0, 1, first=3))
    driver(noise(), 1000)
    driver.runtime.configure(plan=caching(0, 1))
    driver(0.9 * noise(), 900)
    assert heads_of(driver, 1) == [CACHED, CACHED, FULL, FULL]
    assert driver.modes[1][0, ROW].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (caching(0, 1, 2), OptionError, r"caches 3 heads of blocks\.0\.attn and needs a new torch\.compile"),
        (caching(0, order="time"), OptionError, "whose attention is time needs a new torch.compile.*for raster"),
        (Plan.without_schedule("", (1000.0,)), OptionError, "whose attention is None needs a new torch.compile"),
        (
            plan_for(head_plan(np.full((1, 1, 4), FULL), ["other"])),
            PlanError,
            "nothing about the attention 'blocks.0.attn'",
        ),
        (plan_for(head_plan(np.full((1, 1, 3), FULL))), PlanError, "has 4 heads, the plan is for another number"),
    ],
)
def test_plans_that_do_not_fit_are_refused_and_change_nothing(plan, error, message):
    driver = Driver(1, **ALWAYS, plan=caching(0, 1))
    before = driver.runtime.options
    with pytest.raises(error, match=message):
        driver.runtime.configure(plan=plan)
    assert driver.runtime.options is before


def test_a_graph_compiled_without_a_plan_for_heads_takes_none():
    driver = Driver(1, **ALWAYS)
    with pytest.raises(OptionError, match="whose attention is raster needs a new torch.compile.*compiled for None"):
        driver.runtime.configure(plan=caching())


def test_a_layer_that_the_plan_does_not_know_is_an_error_when_the_model_is_compiled():
    plan = plan_for(head_plan(np.full((1, 1, 4), FULL), attentions(1)))
    with pytest.raises(PlanError, match=r"nothing about the attention 'blocks\.1\.attn'"):
        Driver(2, **ALWAYS, plan=plan)


def test_a_step_that_is_not_in_the_plan_is_an_error():
    driver = Driver(1, **ALWAYS, plan=caching(0))
    with pytest.raises(PlanError, match="none of the plan's 5 steps"):
        driver(noise(), 333)
