import itertools

import numpy as np
import pytest
import torch

import qc_compiler
from qc_compiler.calibration.recording import Recording
from qc_compiler.calibration.schedule import exchanges, moves, residual, shortest_path, starts, whole_steps
from qc_compiler.graph import RegionSpec
from tiny_models import compile_eagerly, eager_backend, sample, tiny_dit

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


def test_shortest_path_with_depth_two_is_the_optimum():
    gram = gram_of(np.random.default_rng(1).normal(size=(8, 5)).cumsum(axis=0))

    def cost(path):
        known = ([c for c in reversed(path) if c < i][:2] for i in range(8) if i not in path)
        return sum(residual(gram, k, i) for k, i in zip(known, (i for i in range(8) if i not in path)))

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 8), 3)), key=cost)
    assert cost(shortest_path(gram, 4, 2)) == pytest.approx(cost(best))


def test_every_start_computes_step_0_and_as_many_steps_as_asked():
    gram = gram_of(np.random.default_rng(2).normal(size=(20, 6)).cumsum(axis=0))
    for steps in starts(gram, 6):
        assert steps[0] == 0
        assert len(set(steps)) == 6
        assert steps[-1] < 20


def test_moves_and_exchanges_keep_the_work():
    schedule = whole_steps([0, 4, 9, 15])
    regions = [RegionSpec("output", -1, 0.0), *(RegionSpec(f"blocks.{i}", 0, 1.0) for i in range(4))]
    assert all(len(moved) == 4 and moved[0] == (0, ()) for moved in moves(schedule, 20))
    for exchanged in exchanges(schedule, 20, regions):
        assert sum(len(blocks) / 4 if blocks else 1 for _, blocks in exchanged) == 4


def test_feedback_is_that_of_an_euler_step():
    torch.manual_seed(0)
    xs, vs = [torch.randn(100)], []
    for _ in range(4):
        vs.append(torch.randn(100))
        xs.append(xs[-1] - 0.25 * vs[-1])
    recording = Recording([4.0, 3.0, 2.0, 1.0], {"0": xs[:4]}, {"0": vs})
    assert recording.feedback(1) == pytest.approx(1 / -0.25, rel=1e-3)
    assert recording.feedback(3) == 0.0  # the last step leads nowhere that was recorded
    recording.inputs["0"][2] = torch.randn(100)  # a stochastic sampler
    assert recording.feedback(1) == 0.0


def test_a_plan_spends_its_share_and_beats_uniform_reuse(model, plan):
    assert plan.compute[:, 0].sum() == STEPS // 2
    assert plan.measured["share"] == 0.5
    reference = sample(model, STEPS, seed=5)
    planned = compile_eagerly(model, {"plan": plan})
    uniform = compile_eagerly(model, {"cache": "static", "interval": 2, "level": "output", "cache_order": 1})
    errors = [float((sample(m, STEPS, seed=5) - reference).norm()) for m in (planned, uniform)]
    assert errors[0] < errors[1]
    assert qc_compiler.summary is not None


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
    ],
)
def test_what_cannot_be_calibrated_is_an_error(model, share, generate, message):
    with pytest.raises(qc_compiler.QuantCacheError, match=message):
        qc_compiler.calibrate(model, generate, share=share, budget=1, progress=False, backend=backend)


def test_partial_computation_ends_in_a_plan_that_runs_as_it_says(model):
    plan = qc_compiler.calibrate(
        model, lambda m: sample(m, STEPS), share=0.5, budget=6, progress=False, backend=backend
    )
    assert plan.measured["share"] == pytest.approx(0.5, abs=0.1)
    assert torch.isfinite(sample(compile_eagerly(model, {"plan": plan}), STEPS)).all()
