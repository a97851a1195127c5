from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qc_compiler.calibration.recording import run_steered
from qc_compiler.calibration.samples import Call, Calls
from qc_compiler.errors import OptionError, QuantCacheError
from qc_compiler.trajectory import PendingStep, Position, StreamState, Trajectory
from tiny_models import compile_eagerly, sample, tiny_dit

BATCH, STEPS = 2, 6
WEIGHT = torch.ones(BATCH, 3)  # a parameter that happens to be as long as the batch


def call(step, stream="0", prompt=0.0, batch=BATCH, timestep=None):
    """Inputs: a sample, a timestep without a batch axis, a weight; element [b, 0] of a sample tells who it is."""
    sample = torch.randn(batch, 5, generator=torch.Generator().manual_seed(step))
    sample[:, 0] = 100 * (stream == "1") + 10 * step + torch.arange(batch)
    return Call(
        stream, step, (sample, torch.full((batch,), float(step if timestep is None else timestep)), prompt, WEIGHT)
    )


def calls_of(*calls):
    return Calls(list(calls), latent=0, parameters=frozenset({3}))


def names(batch):
    return batch[0][:, 0].tolist()


# -- pairs


@pytest.mark.parametrize("method", ["tap", "uniform", "random", "kmeans"])
def test_batches_are_made_of_single_samples_of_different_steps(method):
    calls = calls_of(*(call(step) for step in range(STEPS)))
    pairs = calls.pairs(method, 6)
    assert len(pairs) == 3
    found = [name for now, _ in pairs for name in names(now)]
    assert len(set(found)) == 6
    assert any(len({int(name // 10) for name in names(now)}) > 1 for now, _ in pairs)
    for now, later in pairs:
        # everything that has the batch as its first axis travels with its sample
        assert (now[1] == now[0][:, 0] // 10).all()
        assert names(later) == [name + 10 for name in names(now)]
        assert (later[1] == now[1] + 1).all()
        assert now[3] is later[3] is WEIGHT


def test_a_sample_is_taken_whole():
    known = [call(step) for step in range(STEPS)]
    ((now, _),) = calls_of(*known).pairs("random", 2)
    for row in now[0]:
        step, b = divmod(int(row[0]), 10)
        assert torch.equal(row, known[step].inputs[0][b])


def test_the_number_is_rounded_up_to_whole_batches_and_down_to_what_there_is():
    calls = calls_of(*(call(step) for step in range(STEPS)))
    assert [len(calls.pairs("uniform", count)) for count in (1, 2, 3, 99)] == [1, 1, 2, STEPS - 1]


def test_samples_whose_calls_differ_in_what_has_no_batch_are_kept_apart():
    calls = calls_of(*(call(step, prompt=step // 3) for step in range(STEPS)))
    pairs = calls.pairs("uniform", 99)
    for now, later in pairs:
        assert set((now[0][:, 0] // 30).tolist()) == {now[2]}
        assert set((later[0][:, 0] // 30).tolist()) == {later[2]}
    # steps 0 and 1 are followed by a call like them, step 2 by one with another prompt, 3 and 4 by one like them
    assert [(now[2], later[2]) for now, later in pairs] == [(0, 0)] * 2 + [(0, 1)] + [(1, 1)] * 2


def test_a_tensor_without_batch_axis_tells_samples_apart_too():
    def with_scalar(step):
        x, t, _, weight = call(step).inputs
        return Call("0", step, (x, t, torch.tensor(float(step >= 3)), weight))

    for now, later in calls_of(*map(with_scalar, range(STEPS))).pairs("uniform", 99):
        assert set((now[0][:, 0] >= 30).tolist()) == {bool(now[2])}
        assert set((later[0][:, 0] >= 30).tolist()) == {bool(later[2])}


def test_the_next_step_is_that_of_the_same_stream():
    calls = calls_of(*(call(step, stream) for step in range(4) for stream in ("0", "1")))
    pairs = calls.pairs("uniform", 99)
    assert len(pairs) == 6
    for now, later in pairs:
        assert names(later) == [name + 10 for name in names(now)]


def test_the_next_step_is_the_next_one_that_was_computed():
    calls = calls_of(*(call(step) for step in (0, 3, 4)))
    steps = {int(a // 10): int(b // 10) for pair in calls.pairs("uniform", 99) for a, b in zip(*map(names, pair))}
    assert steps == {0: 3, 3: 4}


def test_the_next_step_of_the_last_is_not_the_first_of_another_trajectory():
    calls = calls_of(*(call(step) for _ in range(2) for step in range(3)))
    for now, later in calls.pairs("uniform", 99):
        assert names(later) == [name + 10 for name in names(now)]


def test_a_batch_that_is_not_full_repeats_its_samples():
    calls = calls_of(call(0, prompt="a", batch=3), call(1, prompt="b", batch=3), call(2, prompt="b", batch=3))
    pairs = calls.pairs("random", 5)
    sizes = [len(set(names(now))) for now, _ in pairs]
    assert all(len(names(now)) == len(names(later)) == 3 for now, later in pairs)
    assert sorted(sizes) in ([2, 3], [1, 1, 3], [1, 3], [2, 2], [3, 3])
    one = calls_of(*(call(step, prompt=step, batch=3) for step in range(3)))
    for now, later in one.pairs("random", 3):
        assert now[0].shape == (3, 5)
        assert names(later) == [name + 10 for name in names(now)]


def test_a_choice_that_splits_a_batch_is_padded_by_repetition():
    calls = calls_of(*(call(step, prompt=step) for step in range(STEPS)))
    pairs = calls.pairs("uniform", 4)
    repeated = [names(now) for now, _ in pairs if len(set(names(now))) == 1]
    assert repeated  # uniform takes single samples of some steps, whose batches cannot be mixed with others


@pytest.mark.parametrize("calls", [calls_of(call(0)), calls_of(call(0, "0"), call(0, "1"))])
def test_fewer_than_two_steps_are_an_error(calls):
    with pytest.raises(QuantCacheError, match="computed fewer than two steps"):
        calls.pairs("tap", 4)


def test_an_unknown_selection_is_an_error():
    with pytest.raises(OptionError, match="did you mean 'kmeans'"):
        calls_of(call(0), call(1)).pairs("kmean", 2)


# -- what is kept


def observed(calls, inputs, computed=True, step=0):
    state = StreamState([PendingStep(step, 0.0, np.array([computed]), ())])
    position = Position(Trajectory(None, [state]), False, step, 0)
    graph = SimpleNamespace(latent=0, parameters=(3,))
    return calls.observe(graph, position, 0.0, inputs, ("result",))


def test_only_computed_calls_are_kept_and_results_pass_through():
    calls = Calls()
    assert observed(calls, call(0).inputs, computed=True) == ("result",)
    observed(calls, call(1).inputs, computed=False, step=1)
    assert [known.step for known in calls.calls] == [0]


def test_inputs_are_copied_but_for_parameters_and_what_did_not_change():
    calls, inputs = Calls(), call(0).inputs
    observed(calls, inputs)
    expected = inputs[0].clone()
    observed(calls, inputs, step=1)
    inputs[0].zero_()  # a sampler may work in place
    first, second = calls.calls
    assert torch.equal(first.inputs[0], expected)
    assert second.inputs[0] is first.inputs[0]
    assert first.inputs[3] is WEIGHT


def test_on_a_cached_trajectory_only_computed_steps_are_seen():
    compiled, calls = compile_eagerly(tiny_dit(2), {"cache": "static", "interval": 2, "level": "output"}), Calls()
    run_steered(compiled, lambda m: sample(m, STEPS), calls)
    assert [(known.stream, known.step) for known in calls.calls] == [("0", 0), ("0", 2), ("0", 4)]
    assert calls.batch == 2
    (now, later), *_ = calls.pairs("tap", 4)
    assert {len(now), len(later)} == {len(calls.calls[0].inputs)}
    assert all(now[i] is calls.calls[0].inputs[i] for i in calls.parameters)
