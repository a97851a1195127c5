import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from histories import history
from qc_compiler.controllers import SRAP, pruning_rule
from qc_compiler.controllers.srap import _uniform
from qc_compiler.options import Options

ONES = [[1], [1], [1]]


def after(cosine, change=(9e9, 0.1, 0.1), computed=ONES, **kwargs):
    """Returns the history of one block, computed three times."""
    return history(computed, cosine=[[cosine]] * len(computed), change=[[c] for c in change], **kwargs)


def share(given, **fields):
    """Returns at which part of 2000 seeds the block is pruned."""
    return np.mean([SRAP(**fields, seed=seed).decide(given)[0] for seed in range(2000)])


@pytest.mark.parametrize(
    ("cosine", "expected"), [(0.9951, 1.0), (0.979, 0.0), (0.5, 0.0), (-1.0, 0.0), (math.nan, 0.0)]
)
def test_outside_the_band_nothing_is_left_to_chance(cosine, expected):
    assert share(after(cosine)) == expected


@pytest.mark.parametrize(
    ("change", "probability"),
    [
        ((9e9, 0.1, 0.1), 0.5),  # as ever; what the first step says is compared with nothing, and does not count
        ((9e9, 0.3, 0.1), 2 / 3),  # still: V̄ = .2, V = .1
        ((9e9, 0.1, 0.3), 0.4),  # moving: V̄ = .2, V = .3
        ((9e9, 0.2, 0.0), 1.0),
        ((9e9, 0.0, 0.0), 0.5),
        ((9e9, 0.1, math.nan), 0.0),
    ],
)
def test_within_the_band_stillness_raises_the_probability(change, probability):
    assert share(after(0.99, change)) == pytest.approx(probability, abs=0.04)
    assert share(after(0.99, change), base=0.25) == pytest.approx(probability / 2, abs=0.04)


def test_after_one_computed_step_the_probability_is_the_base():
    assert share(after(0.99, (9e9,), [[1]])) == pytest.approx(0.5, abs=0.04)


def test_a_change_counts_by_the_steps_that_it_took():
    computed = [[1], [1], [0], [0], [0], [1]]
    assert share(after(0.99, (9e9, 0.1, 0, 0, 0, 0.4), computed)) == pytest.approx(0.5, abs=0.04)


def test_the_lower_limit_is_four_times_as_far_from_one():
    assert share(after(0.961), threshold=0.99) == pytest.approx(0.5, abs=0.04)
    assert share(after(0.959), threshold=0.99) == 0


def test_a_threshold_of_one_prunes_nothing():
    assert share(after(np.float32(1.0000001)), threshold=1.0) == 0


def test_only_the_last_computed_step_counts():
    given = history([[1, 1], [1, 0]], cosine=[[0.5, 1.0], [1.0, 0.5]])
    assert SRAP().decide(given).tolist() == [True, True]


@pytest.mark.parametrize(("num_steps", "expected"), [(None, True), (6, True), (5, False), (4, False)])
def test_the_last_two_steps_are_whole(num_steps, expected):
    assert SRAP().decide(after(1.0, num_steps=num_steps)).tolist() == [expected]


def test_what_only_observes_is_never_pruned():
    regions = ("output", "probe", "network", "blocks.0")
    assert SRAP().decide(history([[1] * 4], regions=regions, cosine=[[1] * 4])).tolist() == [False] * 3 + [True]


def test_a_region_that_was_never_computed_is_not_pruned():
    assert SRAP().decide(history([[0]], cosine=[[1]])).tolist() == [False]


@pytest.mark.parametrize(
    ("pruned", "expected"),
    [([0, 1, 1, 1], True), ([0, 1, 1, 1, 1], False), ([0, 1, 0, 1, 0, 1], True), ([0, 1, 0, 1, 0, 1, 0, 1], False)],
)
def test_after_four_computed_steps_it_is_measured_anew(pruned, expected):
    """A step that is neither pruned nor computed was reused, and does not count."""
    given = history([[i == 0] for i in range(len(pruned))], cosine=[[1]] * len(pruned))
    steps = [replace(step, pruned=np.array([bool(out)]) if out else None) for step, out in zip(given.steps, pruned)]
    assert SRAP().decide(replace(given, steps=steps)).tolist() == [expected]


def test_a_computed_step_begins_the_count_anew():
    given = history([[1], [0], [0], [0], [1], [0]], cosine=[[1]] * 6)
    steps = [step if step.computed[0] else replace(step, pruned=np.array([True])) for step in given.steps]
    assert SRAP().decide(replace(given, steps=steps)).tolist() == [True]


def test_each_seed_step_and_region_draws_for_itself():
    drawn = {_uniform(seed, step, f"blocks.{r}") for seed in range(5) for step in range(5) for r in range(5)}
    assert len(drawn) == 125
    assert np.mean(list(drawn)) == pytest.approx(0.5, abs=0.1)


def test_the_draw_is_the_same_in_every_process():
    code = "from qc_compiler.controllers.srap import _uniform; print(_uniform(3, 7, 'blocks.2'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) == _uniform(3, 7, "blocks.2")


def test_options_reach_the_rule():
    assert pruning_rule(Options(prune="srap")) == SRAP()
    assert pruning_rule(Options(prune="srap", prune_threshold=0.9, prune_seed=4)) == SRAP(threshold=0.9, seed=4)
